"""FMA2D as a backbone of mmsegmentation, mmdetection and whatever else builds models from mmengine's registry.

A config needs `custom_imports = dict(imports=["fma2d.mmseg"])`. That registers the backbone `FMA2D`, and lets every
place that takes a checkpoint (`init_cfg`, `load_from`, `init_model`) take a safetensors file too. A program that reads
this project's configs imports it first: see `MODULE2PACKAGE` below.
"""

from importlib import metadata

from mmengine.config.utils import MODULE2PACKAGE

from ..models import ARCHS
from .backbone import FMA2D, load_model
from .checkpoints import CheckpointError, PlainCheckpoints, load_tensors, read_weights

__all__ = ["ARCHS", "FMA2D", "CheckpointError", "PlainCheckpoints", "load_model", "load_tensors", "read_weights"]

# mmengine finds `_base_ = ["mmseg::..."]` by the distribution, which the maintained continuation has renamed; a name
# that is no distribution it looks up as a module.
try:
    metadata.distribution(MODULE2PACKAGE["mmseg"])
except metadata.PackageNotFoundError:
    MODULE2PACKAGE["mmseg"] = "mmseg"
