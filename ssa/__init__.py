"""Spatial sparse attention over voxels: coordinates in, attention out (arXiv 2505.17412)."""

from .functional import (
    block_mean,
    block_topk,
    compression_attention,
    group_norm_silu,
    selected_attention,
    spatial_sparse_attention,
    submanifold_conv3d,
    varlen_attention,
    window_attention,
)
from .module import SpatialSparseAttention, explain
from .partition import Blocks, VoxelPartition, partition_voxels

__version__ = "0.1.0"
