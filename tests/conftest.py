"""Hypothesis settings, and which files a machine collects: nothing is skipped, what cannot run here is not collected."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from utils import CUDA, IMPL

# a test of random layouts runs for each of six combinations of heads: 300 layouts on CUDA, 24 elsewhere
settings.register_profile(
    "ssa", max_examples=50 if CUDA else 4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("ssa")

torch.set_float32_matmul_precision("highest")

# under the interpreter kernels are Python functions: there is nothing to compile
collect_ignore = ["test_aot.py"] if IMPL == "triton" and not CUDA else []


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers in every run, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_tapes():
    """A test may change the constants of a launcher, which a tape of the test before would not know."""
    if IMPL == "triton":
        from ssa.kernels.replay import forget

        forget()
