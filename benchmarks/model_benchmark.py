"""FMA2D models against Swin, ViT and MiT at any resolution."""

from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fma2d  # noqa: F401  (registers its models)
from fma2d.baselines import mit_attention

from .harness import GateError, Task, Work, text_table
from .records import total_mib

MODES = ("inference", "training step")
CLASSES = 1000
# MiT's layout: an FMA2D skeleton with another attention.
MIT = {"mit_b0": "fma2d_nano", "mit_b2": "fma2d_tiny", "mit_b3": "fma2d_small"}
# Models of about one size, compared with the first.
CLASSES_OF_SIZE = (
    ("swin_tiny_patch4_window7_224", "fma2d_tiny", "mit_b2"),
    ("swin_small_patch4_window7_224", "fma2d_small", "mit_b3"),
    ("swin_base_patch4_window7_224", "fma2d_base", "vit_base_patch16_224"),
    ("swin_large_patch4_window7_224", "fma2d_large", "vit_large_patch16_224"),
)
DEFAULT = [*CLASSES_OF_SIZE[0], *CLASSES_OF_SIZE[2]]


def tasks(
    models: Sequence[str],
    sizes: Sequence[int],
    modes: Sequence[str] = MODES[:1],
    variants: Sequence[str] = ("linear",),
    batch: int = 1,
    cell_size: int = 8,
    rank: int = 4,
    photo: str | None = None,
    **setting,
) -> list[Task]:
    """Tasks for each size, mode and model; `photo`: the file to run on, else noise; `setting`: of `Task`."""
    found = []
    for size in sorted(sizes):
        for mode in modes:
            for name in models:
                subject = dict(benchmark="model", name=name, mode=mode, height=size, width=size, batch=batch)
                own = [dict(variant=v, cell_size=cell_size, rank=rank) for v in variants]
                for options in own if name.startswith("fma2d") else [{}]:
                    extra = {"photo": photo} if photo else {}
                    found.append(Task(f"{__name__}:build", subject | options, size**2, extra=extra, **setting))
    return found


def is_known(name: str) -> bool:
    """Whether `create` knows a name."""
    return name in MIT or timm.is_model(name)


def create(name: str, size: int, **options) -> nn.Module:
    """A model with random weights for square images of `size` pixels a side."""
    if name in MIT:
        return timm.create_model(MIT[name], attn_layer=mit_attention)
    return timm.create_model(name, img_size=size, **options)


def build(*, benchmark, name, mode, height, width, batch, device, dtype, photo=None, **options) -> Work:
    """The work of a row."""
    torch.manual_seed(0)
    like = dict(device=device, dtype=getattr(torch, dtype))
    model = create(name, height, **options).to(**like)
    images = (torch.randn(1, 3, height, width) if photo is None else load_photo(photo, height)).to(**like)
    stride = model.feature_info[0]["reduction"]
    tokens = batch * (height // stride) * (width // stride)
    return work_of(model, images.expand(batch, -1, -1, -1).contiguous(), tokens, train=mode == "training step")


def work_of(model: nn.Module, images: Tensor, tokens: int, train: bool = False) -> Work:
    """Logits of a batch without gradients, or a whole step of AdamW."""
    model.train(train)
    batch = len(images)
    target = torch.zeros(batch, dtype=torch.long, device=images.device)
    optimizer = torch.optim.AdamW(model.parameters()) if train else None

    def step() -> Tensor:
        if not train:
            with torch.inference_mode():
                return model(images)
        optimizer.zero_grad()
        logits = model(images)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        return logits.detach()

    def check(logits: Tensor) -> None:
        if logits.shape != (batch, CLASSES) or not logits.isfinite().all():
            raise GateError(f"logits are not {batch} x {CLASSES} finite numbers")

    def warm_up() -> None:
        F.conv2d(images[..., :32, :32], images.new_zeros(8, 3, 4, 4)).flatten(2) @ images.new_zeros(29 * 29, 8)

    def facts() -> dict:
        parameters = sum(p.numel() for p in model.parameters())
        return dict(tokens=tokens, params=parameters, macs=count_macs(model, images))

    return Work(step=step, check=check, warm_up=warm_up, facts=facts)


def load_photo(path: str, size: int) -> Tensor:
    """The photo's central square at `size` pixels a side, normalised: `[1, 3, size, size]`."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import normalize, to_tensor

    image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return normalize(to_tensor(image), timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)[None]


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of matrix products and convolutions of one inference; nothing is computed.

    Of multipole attention, the scores and their use are counted, not the aggregation.
    """
    counter = FlopCounterMode(display=False)
    # Dense attention by plain products: torch does not count those of its fused kernel for CPUs.
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(images)
    return counter.get_total_flops() // 2


def table(rows: list[dict]) -> str:
    """The rows of a run beside the Swin of about their size in the same run, and what was left out."""
    ok = {_place(row): row for row in rows if row["status"] == "ok"}
    lines, notes = [], []
    for row in rows:
        if row["status"] != "ok":
            notes.append(f"{row['name']} {row['height']}x{row['width']} {row['mode']}: {row['status']}")
            continue
        peer_name = next((group[0] for group in CLASSES_OF_SIZE if row["name"] in group), "")
        peer = ok.get(_place(row | dict(name=peer_name, variant="", cell_size="", rank="")))
        line = [row["height"], row["mode"], row["name"], row["variant"], row["tokens"]]
        line += [f"{int(row['params']) / 1e6:.1f}", f"{int(row['macs']) / 1e9:.1f}", f"{float(row['median_ms']):.4g}"]
        line += [f"{1000 * int(row['batch']) / float(row['median_ms']):.2f}", *_memory_columns(row)]
        line += [f"{float(row['median_ms']) / float(peer['median_ms']):.2f}" if peer else "-"]
        line += [f"{total_mib(row) / total_mib(peer):.2f}" if peer and row["peak_mib"] else "-"]
        lines.append(line)
    header = ["pixels", "mode", "model", "variant", "tokens", "M params", "GMACs", "ms", "images/s"]
    header += ["base MiB", "work MiB", "time/Swin", "memory/Swin"]
    return "\n".join([text_table(header, lines), *notes])


def _memory_columns(row: dict) -> list[str]:
    return [f"{float(row[name]):.0f}" if row[name] else "-" for name in ("base_mib", "peak_mib")]


def _place(row: dict) -> tuple:
    names = ("height", "width", "mode", "batch", "device", "dtype", "name", "variant", "cell_size", "rank")
    return tuple(row[name] for name in names)
