"""A reference 3D generator on `ssa`: meshes to sparse volumes and back, the SS-VAE and the SS-DiT (paper: arXiv 2505.17412)."""
