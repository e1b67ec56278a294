"""The torch.library boundary, one file an op: operator, fake and gradient around the launchers of `ssa.kernels`."""
