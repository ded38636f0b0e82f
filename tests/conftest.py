"""Settings for every test."""

import os

# Triton reads this when it is first imported, and torchvision, timm and mmseg import it early: so before anything else.
# With it, the kernels run in Triton's interpreter where there is no GPU. Set it to 0 to run them compiled on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no limit of time for one: a first call may compile or fill a cache.
settings.register_profile("fma2d", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fma2d")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers, alone or in company."""
    torch.manual_seed(0)
