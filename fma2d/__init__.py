"""Fast Multipole Attention as a vision backbone library; importing it registers the models in timm."""

from . import backbone, models
from .convert import convert_attention
from .geometry import cover, num_levels
from .kernels import start_kernels
from .modules import FMA1d, FMA2d
from .ops import multipole_attention, why_not
from .optim import param_groups

__version__ = "0.1.0"
__all__ = [
    "FMA1d",
    "FMA2d",
    "backbone",
    "convert_attention",
    "cover",
    "models",
    "multipole_attention",
    "num_levels",
    "param_groups",
    "start_kernels",
    "why_not",
]
