"""The torch.library boundary, one file an op: custom op, fake and gradient around the launchers of `ssa.kernels`."""
