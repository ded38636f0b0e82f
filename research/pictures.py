"""Other attention in the backbone of a segmentation config, for the comparisons that research/pictures.md names."""

from mmengine.registry import MODELS
from torch import nn

from fma2d.baselines import mit_attention
from fma2d.mmseg import FMA2D

from .attention_layers import NearFieldAttention, WindowAttention


@MODELS.register_module()
class OtherAttention(FMA2D):
    """`FMA2D` with another attention on the same skeleton.

    Args:
        attention: "mit"; "near", the near field of cells of `cell_size` tokens alone; "windows" as wide as it, three
            cells, shifted in every second block.
        cell_size: tokens per side of a base cell, in all stages.
        **settings: those of `FMA2D`.

    Raises:
        KeyError: for another attention.
    """

    def __init__(self, attention: str, cell_size: int, **settings):
        def near(dim: int, num_heads: int, stage: int, block: int) -> nn.Module:
            return NearFieldAttention(dim, num_heads, cell_size=cell_size)

        def windows(dim: int, num_heads: int, stage: int, block: int) -> nn.Module:
            shift = 3 * cell_size // 2 if block % 2 else 0
            return WindowAttention(dim, num_heads, window=3 * cell_size, shift=shift)

        layers = dict(mit=mit_attention, near=near, windows=windows)
        super().__init__(attn_layer=layers[attention], **settings)
