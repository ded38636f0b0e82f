"""The FMA2D skeleton without a far field, to see what far context is worth on the generated scenes."""

from mmengine.registry import MODELS
from torch import nn

from fma2d.baselines import WindowAttention
from fma2d.mmseg import FMA2D


@MODELS.register_module()
class NearFieldFMA2D(FMA2D):
    """FMA2D whose attention is cut to windows of about as many pixels in every stage, shifted in every other block.

    Args:
        windows: tokens a side of each stage's windows. The start value, 48 px in the first three stages and a token of
            its own in the last, is the extent of FMA's near field in the first stage with cells of 4 tokens; in the
            later stages that near field would hold a whole image of 128 px.
    """

    def __init__(self, windows: tuple[int, ...] = (12, 6, 3, 1), **kwargs):
        def window_attention(dim: int, num_heads: int, stage: int, block: int) -> nn.Module:
            window = windows[stage]
            return WindowAttention(dim, num_heads, window, shift=window // 2 if block % 2 else 0)

        super().__init__(attn_layer=window_attention, **kwargs)
