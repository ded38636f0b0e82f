"""Fast Multipole Attention as a vision backbone library."""

from .aggregation import start_kernels
from .geometry import cover, num_levels
from .ops import multipole_attention, why_not

__version__ = "0.1.0"
