"""Text models over `fma2d.FMA1d`: language models, classification, generation with a logarithmic cache."""

from .cache import Cache
from .files import load_model, save_model
from .model import CausalLM, MaskedLM, SequenceClassifier

__all__ = ["Cache", "CausalLM", "MaskedLM", "SequenceClassifier", "load_model", "save_model"]
