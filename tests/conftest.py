"""Hypothesis settings, and which files a machine collects: nothing is skipped, what cannot run here is not collected."""

import torch
from hypothesis import settings
from utils import CUDA, IMPL

settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("cuda", max_examples=300, deadline=None, derandomize=True)
settings.load_profile("cuda" if CUDA else "ci")

torch.set_float32_matmul_precision("highest")

# under the interpreter kernels are Python functions: there is nothing to compile
collect_ignore = ["test_aot.py"] if IMPL == "triton" and not CUDA else []
