"""Triton kernels and their launchers: they know tensors and numbers, nothing of modules or space."""
