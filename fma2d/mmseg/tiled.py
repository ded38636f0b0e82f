"""Whole-image segmentation with mmsegmentation's models, for images whose logits would not fit in memory.

Of an image of 8192 px, 150 logits a pixel are 40 GB, and the map that SegFormer's head fuses at a quarter of the size
is 17 to 51 GB. Here the backbone sees the whole image, and the head and the argmax run on one tile of the result at a
time.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from mmseg.models.decode_heads import SegformerHead
from torch import Tensor, nn

Range = tuple[int, int]  # start and stop


def source_range(part: Range, size: int, source: int) -> Range:
    """The places of an axis of `source` that bilinear resizing to `size` reads for the places `part` of the result."""
    if size == source:
        return part
    low, high, _ = taps(part, size, source, torch.device("cpu"))
    return int(low[0]), int(high[-1]) + 1


def taps(part: Range, size: int, source: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each place of `part`: the two source places that are mixed, and the share of the second."""
    # As torch computes them, in float32, for align_corners=False.
    place = torch.arange(*part, dtype=torch.float32, device=device)
    place = ((place + 0.5) * (source / size) - 0.5).clamp_(min=0)
    low = place.long().clamp_(max=source - 1)
    return low, (low + 1).clamp_(max=source - 1), place - low


def resize_part(x: Tensor, parts: Sequence[Range], sizes: Sequence[int], sources: Sequence[int]) -> Tensor:
    """A part of what `interpolate(mode="bilinear")` makes of a map, from the part of the map that it reads.

    Args:
        x: `[..., h, w]`, the `source_range` of `parts`.
        parts: the rows and the columns wanted.
        sizes: height and width of the whole result.
        sources: those of the whole map.
    """
    for axis in (1, 0):  # rows last: what they are mixed from is small
        if sizes[axis] == sources[axis]:
            continue
        dim = axis - 2
        low, high, share = taps(parts[axis], sizes[axis], sources[axis], x.device)
        first = int(low[0])
        shape = (-1, 1) if axis == 0 else (-1,)
        start, stop = (x.index_select(dim, index - first) for index in (low, high))
        x = start.lerp_(stop, share.to(x.dtype).reshape(shape))
    return x


def head_part(head: nn.Module, features: Sequence[Tensor], parts: Sequence[Range]) -> Tensor:
    """Logits `[1, classes, h, w]` of SegFormer's head in some rows and columns of the first, largest feature map."""
    features = [features[i] for i in head.in_index]
    sizes = features[0].shape[-2:]
    maps = []
    for conv, x in zip(head.convs, features, strict=True):
        sources = x.shape[-2:]
        (top, bottom), (left, right) = map(source_range, parts, sizes, sources)
        maps.append(resize_part(conv(x[..., top:bottom, left:right]), parts, sizes, sources))
    return head.cls_seg(head.fusion_conv(torch.cat(maps, 1)))


def smallest_integer(classes: int) -> torch.dtype:
    """The smallest dtype that holds the indices of so many classes."""
    return torch.uint8 if classes <= 256 else torch.int16


@torch.inference_mode()
def segment(
    model: nn.Module,
    image: Tensor,
    size: tuple[int, int] | None = None,
    tile: int = 256,
    progress: Callable[[list], Iterable] = iter,
) -> Tensor:
    """The class of every pixel, as mmsegmentation's whole mode finds them.

    Equal up to rounding: a pixel may differ where two classes score the same to the last digits. A head other than
    SegFormer's runs on the whole map, and only the argmax in tiles.

    Args:
        model: an `EncoderDecoder` in evaluation mode.
        image: `[1, 3, H, W]`, normalised.
        size: height and width of the result (those of the image): the image as it was before it was resized.
        tile: rows and columns of the result that are in memory at a time.
        progress: wraps the list of tiles, as tqdm does.

    Returns:
        `[*size]`, uint8 (int16 for more than 256 classes), on the CPU.
    """
    if len(image) != 1:
        raise ValueError(f"image must be one image, got a batch of {len(image)}")
    head = model.decode_head
    if head.align_corners:
        raise ValueError("the head must have align_corners=False")
    height, width = size or image.shape[-2:]
    features = model.extract_feat(image)
    in_tiles = type(head) is SegformerHead and head.interpolate_mode == "bilinear"
    whole = None if in_tiles else head(features)
    map_size = (features[head.in_index[0]] if in_tiles else whole).shape[-2:]

    result = torch.empty(height, width, dtype=smallest_integer(head.num_classes))
    rows = [(start, min(start + tile, height)) for start in range(0, height, tile)]
    cols = [(start, min(start + tile, width)) for start in range(0, width, tile)]
    for parts in progress([(r, c) for r in rows for c in cols]):
        # mmsegmentation resizes twice: to the image as the network saw it, and to the image as it was.
        seen = list(map(source_range, parts, (height, width), image.shape[-2:]))
        (top, bottom), (left, right) = mapped = list(map(source_range, seen, image.shape[-2:], map_size))
        logits = head_part(head, features, mapped) if in_tiles else whole[..., top:bottom, left:right]
        logits = resize_part(logits, seen, image.shape[-2:], map_size)
        logits = resize_part(logits, parts, (height, width), image.shape[-2:])
        (top, bottom), (left, right) = parts
        # One channel tells the second of two classes from the first.
        found = logits[0, 0].sigmoid() > head.threshold if head.out_channels == 1 else logits[0].argmax(0)
        result[top:bottom, left:right] = found
    return result
