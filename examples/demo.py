"""A mesh → voxels → spatial sparse attention, forward and backward, against the dense reference: `make demo [MESH=path]`.

Prints a table and draws what one query attends to.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor

import ssa
from benchmarks.voxels import load_mesh, surface_voxels
from examples.picture import Camera, draw_attention

HIDDEN, NUM_HEADS, NUM_KV_HEADS, TOPK = 128, 4, 2, 8
MIN_VOXELS, FINEST = 5000, 256
TOLERANCE = 1e-4  # fp32 on both sides, relative to the largest entry


def trefoil(radius: float = 0.45, steps: int = 360, sides: int = 48) -> trimesh.Trimesh:
    """A closed tube round the trefoil knot (sin t + 2 sin 2t, cos t − 2 cos 2t, −1.1 sin 3t)."""
    t = np.linspace(0, 2 * np.pi, steps, endpoint=False)[:, None]
    center = np.concatenate([np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -1.1 * np.sin(3 * t)], 1)
    tangent = np.roll(center, -1, 0) - np.roll(center, 1, 0)
    side = np.cross(tangent, [0.0, 0.0, 1.0])
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    up = np.cross(side, tangent)
    up /= np.linalg.norm(up, axis=1, keepdims=True)
    a = np.linspace(0, 2 * np.pi, sides, endpoint=False)[:, None]
    vertices = center[:, None] + radius * (np.cos(a) * side[:, None] + np.sin(a) * up[:, None])
    i, j = np.indices((steps, sides)).reshape(2, -1)
    ring, turn = (i + 1) % steps, (j + 1) % sides
    corners = np.stack([i * sides + j, ring * sides + j, ring * sides + turn, i * sides + turn], 1)
    return trimesh.Trimesh(vertices.reshape(-1, 3), np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]]))


def voxelise(mesh: trimesh.Trimesh) -> tuple[Tensor, int]:
    """Surface voxels [T,4] on the coarsest grid, in steps of 4, that has at least MIN_VOXELS of them, and its resolution."""
    for resolution in range(32, FINEST + 1, 4):
        coords = surface_voxels(mesh, resolution)
        if len(coords) >= MIN_VOXELS:
            return coords, resolution
    raise ValueError(f"the mesh must pass through {MIN_VOXELS} cells of a {FINEST}^3 grid, got {len(coords)}")


def position_code(xyz: Tensor, channels: int) -> Tensor:
    """[T,3] integers → [T,channels]: sines and cosines of every axis at F = channels // 6 frequencies 10000^(−j/F), zero-padded."""
    count = channels // 6
    phase = xyz[..., None] * 10000 ** (-torch.arange(count, device=xyz.device) / count)  # [T, 3, F]
    code = torch.cat([phase.sin(), phase.cos()], -1).flatten(1)
    return torch.nn.functional.pad(code, (0, channels - code.shape[1]))


def timed(work, device: torch.device):
    """The result of work() and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def run(layer: ssa.SpatialSparseAttention, x: Tensor, dy: Tensor, partition: ssa.VoxelPartition, chosen: Tensor) -> tuple[dict, list]:
    """y, dx and the gradients of all weights by name, with the chosen blocks held fixed; seconds forward and backward."""
    x = x.clone().requires_grad_()

    def forward() -> Tensor:
        projected = layer.project(x, partition)
        o = ssa.spatial_sparse_attention(*projected, layer.gate(x), partition, topk=layer.topk, topk_indices=chosen, impl=layer.impl)
        return layer.proj_o(o.flatten(1))

    y, forward_s = timed(forward, x.device)
    weights = dict(layer.named_parameters())
    grads, backward_s = timed(lambda: torch.autograd.grad(y, [x, *weights.values()], dy), x.device)
    return dict(zip(["y", "dx", *weights], [y.detach(), *grads], strict=True)), [forward_s, backward_s]


def compare(
    layer: ssa.SpatialSparseAttention, reference: ssa.SpatialSparseAttention, x: Tensor, partition: ssa.VoxelPartition
) -> tuple[dict[str, float], list[float], list[float], Tensor]:
    """Largest difference of y, dx and every weight's gradient, over the largest entry of the reference; both seconds; the choice shared."""
    dy = torch.randn_like(x)
    with torch.no_grad():
        q, _, _, k_cmp, v_cmp = layer.project(x, partition)
        _, lse = ssa.compression_attention(q, k_cmp, v_cmp, partition, impl=layer.impl)
        chosen = ssa.block_topk(q, k_cmp, lse, partition, layer.topk, impl=layer.impl)
    fast, fast_s = run(layer, x, dy, partition, chosen)
    dense, dense_s = run(reference, x, dy, partition, chosen)
    scale = {k: dense[k].abs().max() for k in dense}
    scale["compression_key.conv.bias"] = scale["compression_value.conv.bias"]  # a shift of all keys changes no softmax: its gradient is 0
    return {k: float((fast[k] - dense[k]).abs().max() / scale[k]) for k in dense}, fast_s, dense_s, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=Path, help="any file trimesh reads; default: a trefoil knot")
    parser.add_argument("--up", choices=("y", "z"), help="the mesh's upward axis; default: y for GLB and glTF, z for other files")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh, name = trefoil(), "trefoil knot"
    if args.mesh:
        mesh, name = load_mesh(args.mesh), args.mesh.stem
        if (args.up or ("y" if args.mesh.suffix.lower() in (".glb", ".gltf") else "z")) == "y":
            mesh.vertices = mesh.vertices[:, [0, 2, 1]] * [1, -1, 1]
    coords, resolution = voxelise(mesh)

    layer = ssa.SpatialSparseAttention(HIDDEN, NUM_HEADS, NUM_KV_HEADS, topk=TOPK, device=device)
    reference = ssa.SpatialSparseAttention(HIDDEN, NUM_HEADS, NUM_KV_HEADS, topk=TOPK, device=device, impl="naive")
    reference.load_state_dict(layer.state_dict())
    partition = layer.partition(coords.to(device))
    x = position_code(partition.coords[:, 1:], HIDDEN)

    error, fast_s, dense_s, chosen = compare(layer, reference, x, partition)
    report(name, resolution, partition, chosen, device, fast_s, dense_s, error)

    draw(args.out, name, layer, x, partition)
    print(f"\nwhat one query attends to: {args.out}")
    worst = max(error, key=lambda k: error[k])
    if not error[worst] <= TOLERANCE:
        raise SystemExit(f"differs from the dense reference by more than {TOLERANCE:g}: {worst} {error[worst]:.1e}")


def report(
    name: str,
    resolution: int,
    partition: ssa.VoxelPartition,
    chosen: Tensor,
    device: torch.device,
    fast_s: list[float],
    dense_s: list[float],
    error: dict[str, float],
) -> None:
    tokens = partition.num_tokens
    blocks, windows = len(partition.selection), len(partition.window)
    sizes = torch.diff(partition.selection.offsets)
    keys_slc = (sizes[chosen.clamp(min=0).long()] * (chosen >= 0)).sum(-1).float().mean().item()
    keys_win = torch.diff(partition.window.offsets).float().square().sum().item() / tokens
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {tokens:,} surface voxels of a {resolution}³ grid · {where} · torch {torch.__version__} · fp32")
    print(f"{NUM_HEADS} query heads, {NUM_KV_HEADS} key/value heads of {HIDDEN // NUM_HEADS}\n")
    print(f"{'branch':<14}{'a query reads, on average':<42}{'of all voxels':>14}")
    print(f"{'compression':<14}{f'{len(partition.compression)} keys, one a {partition.compression.size}³ block':<42}{'':>14}")
    print(f"{'selection':<14}{f'{keys_slc:.0f} voxels of {TOPK} out of {blocks} blocks':<42}{keys_slc / tokens:>14.1%}")
    print(f"{'window':<14}{f'{keys_win:.0f} voxels of 1 out of {windows} windows':<42}{keys_win / tokens:>14.1%}\n")
    print(f"{'layer':<28}{'forward':>12}{'backward':>12}")
    print(f"{'spatial sparse attention':<28}{fast_s[0]:>10.3f} s{fast_s[1]:>10.3f} s")
    print(f"{'dense reference':<28}{dense_s[0]:>10.3f} s{dense_s[1]:>10.3f} s\n")
    print(f"{'difference to the reference':<28}{'max |Δ| / max |reference|':>28}")
    weights = {k: v for k, v in error.items() if k not in ("y", "dx")}
    worst = max(weights, key=lambda k: weights[k])
    for label, value in (("output", error["y"]), ("gradient of x", error["dx"]), (f"gradients of {len(weights)} weights", weights[worst])):
        print(f"{label:<28}{value:>28.1e}")


def front_voxel(xyz: np.ndarray, window_size: int) -> int:
    _, window, count = np.unique(xyz // window_size, axis=0, return_inverse=True, return_counts=True)
    full = count[window.ravel()] >= np.median(count)
    return int(np.where(full, xyz @ Camera().axes[2], -np.inf).argmax())


def draw(path: Path, name: str, layer: ssa.SpatialSparseAttention, x: Tensor, partition: ssa.VoxelPartition) -> None:
    """The first key/value head of the voxel nearest to the eye whose window is no emptier than most."""
    xyz = partition.coords[:, 1:].cpu().numpy()
    query = front_voxel(xyz, partition.window.size)
    window, chosen, weights = ssa.explain(layer, x, partition, query)
    draw_attention(
        path,
        partition,
        query,
        window=window.cpu().numpy(),
        chosen=chosen[0][chosen[0] >= 0].cpu().numpy(),
        weights=weights[: NUM_HEADS // NUM_KV_HEADS].mean(0).cpu().numpy(),
        subtitle=f"{name}, {len(xyz):,} voxels · first key/value head of a layer at its initial weights · x = position code",
    )


if __name__ == "__main__":
    main()
