"""What one query attends to, as a picture. Cubes are drawn far to near, which is exact for equal cubes seen orthographically."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Affine2D

import ssa

INK, MUTED, BODY = "#16202e", "#667085", "#f3f5f9"
QUERY, CHOSEN, WINDOW = "#e5183f", "#2f6fed", "#f59a0b"
WEIGHT = LinearSegmentedColormap.from_list("weight", ["#f3f5f9", "#c5e3dc", "#5db8a6", "#10847a", "#053f45"])
LIGHT = np.array([0.86, 0.95, 1.0])  # brightness of faces along x, y, z
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
EDGES = np.array([[a, b] for a in range(8) for b in range(a) if (a ^ b) in (1, 2, 4)])
CORNERS = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])


@dataclass(frozen=True)
class Camera:
    """Orthographic view; azimuth and elevation in degrees, z up."""

    azimuth: float = -62.0
    elevation: float = 42.0

    @property
    def axes(self) -> np.ndarray:
        """[3,3] rows: right, up, towards the eye."""
        a, e = np.deg2rad([self.azimuth, self.elevation])
        eye = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        right = np.array([-np.sin(a), np.cos(a), 0.0])
        return np.stack([right, np.cross(eye, right), eye])

    def project(self, points: np.ndarray) -> np.ndarray:
        """[…,3] → […,2]."""
        return points @ self.axes[:2].T


def draw_voxels(ax: Axes, xyz: np.ndarray, color: np.ndarray, camera: Camera, alpha: float = 1.0) -> None:
    """Cubes [n,3] with colours [n,3]; only faces that look at the eye and touch no other cube are drawn."""
    low = xyz.min(0) - 6
    occupied = np.zeros(np.ptp(xyz, axis=0) + 13, dtype=bool)
    occupied[tuple((xyz - low).T)] = True
    filled = np.pad(occupied.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
    polygons, colors, depth = [], [], []
    for axis in range(3):
        normal = np.eye(3, dtype=int)[axis] * (1 if camera.axes[2, axis] > 0 else -1)
        free = ~occupied[tuple((xyz - low + normal).T)]
        cells = xyz[free]
        shade = LIGHT[axis] * (1 - 0.011 * _count(filled, cells - low + 3 * normal))
        corner = cells + np.maximum(normal, 0)
        polygons.append(camera.project(corner[:, None] + np.roll(SQUARE, axis + 1, axis=1)))
        colors.append(color[free] * np.clip(shade, 0.3, 1)[:, None])
        depth.append((cells + 0.5 * normal) @ camera.axes[2])
    order = np.argsort(np.concatenate(depth), kind="stable")
    face = np.concatenate(colors)[order]
    quads = list(np.concatenate(polygons)[order])
    ax.add_collection(PolyCollection(quads, facecolors=face, edgecolors=0.88 * face, linewidths=0.35, joinstyle="round", alpha=alpha))


def _count(filled: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Filled cells of the 5^3 box round each cell [n,3], from the 3D prefix sum: what keeps ambient light away."""
    total = np.zeros(len(cells))
    for corner in CORNERS:
        total += (-1) ** (3 - corner.sum()) * filled[tuple((cells - 2 + 5 * corner).T)]
    return total


def draw_shadow(ax: Axes, xyz: np.ndarray, camera: Camera) -> None:
    """A soft shadow on the floor."""
    pad, low = 12, xyz.min(0)
    cover = np.zeros(np.ptp(xyz[:, :2], axis=0) + 1 + 2 * pad)
    np.maximum.at(cover, tuple((xyz[:, :2] - low[:2] + pad).T), 1 / (1 + 0.06 * (xyz[:, 2] - low[2])))
    kernel = np.exp(-0.5 * (np.arange(-9, 10) / 3) ** 2)
    for axis in range(2):
        cover = np.apply_along_axis(np.convolve, axis, cover, kernel / kernel.sum(), mode="same")
    image = np.zeros((*cover.T.shape, 4))
    image[..., :3], image[..., 3] = to_rgb(INK), 0.3 * cover.T
    (a, b, c), (d, e, f) = camera.axes[:2]
    floor = Affine2D(np.array([[a, b, c * low[2]], [d, e, f * low[2]], [0, 0, 1]]))
    x, y = low[:2] - pad
    extent = (x, x + cover.shape[0], y, y + cover.shape[1])
    look: dict[str, Any] = dict(origin="lower", interpolation="bilinear", clip_on=False, zorder=0)
    ax.imshow(image, extent=extent, transform=floor + ax.transData, **look)


def draw_boxes(ax: Axes, low: np.ndarray, size: int, color: str, camera: Camera) -> None:
    """Wire frames of cubes with lower corners [n,3]."""
    lines = camera.project((low[:, None] + CORNERS * size)[:, EDGES].reshape(-1, 2, 3))
    ax.add_collection(LineCollection(list(lines), colors=color, linewidths=1.0, alpha=0.75, capstyle="round", clip_on=False))


def draw_query(ax: Axes, xyz: np.ndarray, camera: Camera) -> None:
    """The query voxel [3] in red with its name above it."""
    draw_voxels(ax, xyz[None], np.array([to_rgb(QUERY)]), camera)
    x, y = camera.project(xyz + 0.5)
    line: dict[str, Any] = dict(arrowstyle="-", color=QUERY, linewidth=1.6, shrinkA=0, shrinkB=3)
    halo = [withStroke(linewidth=4, foreground="white")]
    text: dict[str, Any] = dict(color=QUERY, fontsize=16, fontweight="bold", ha="center", va="bottom", path_effects=halo)
    ax.annotate("query", (x, y), (x, y + 0.16 * float(np.ptp(ax.get_xlim()))), arrowprops=line, zorder=9, **text)


def draw_shape(ax: Axes, xyz: np.ndarray, color: np.ndarray, camera: Camera) -> None:
    """All voxels in colours [T,3] on their shadow, fitted to the panel."""
    flat = camera.project(xyz + 0.5)
    low, high = flat.min(0) - 2, flat.max(0) + 2
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()
    draw_shadow(ax, xyz, camera)
    draw_voxels(ax, xyz, color, camera)


def draw_group(ax: Axes, xyz: np.ndarray, color: str, low: np.ndarray, size: int, camera: Camera) -> None:
    """Voxels [n,3] seen through whatever hides them, and the cubes they lie in."""
    draw_voxels(ax, xyz, np.tile(np.array(to_rgb(color)), (len(xyz), 1)), camera, alpha=0.3)
    draw_boxes(ax, low, size, color, camera)


def draw_attention(
    path: Path, partition: ssa.VoxelPartition, query: int, window: np.ndarray, chosen: np.ndarray, weights: np.ndarray, subtitle: str
) -> None:
    """One panel a branch, 2400 x 1350 pixels.

    query: packed row; window [n]: packed rows; chosen [k]: ids of selection blocks; weights [C] > 0: softmax over the compression blocks.
    """
    camera, body = Camera(), np.array(to_rgb(BODY))
    xyz = partition.coords[:, 1:].cpu().numpy()
    selection, size, shift = partition.selection, partition.window.size, partition.window_shift
    low_slc = selection.coords[:, 1:].cpu().numpy()[chosen] * selection.size
    low_win = (xyz[[query]] + shift) // size * size - shift
    in_slc = ((xyz[:, None] >= low_slc) & (xyz[:, None] < low_slc + selection.size)).all(-1).any(-1)
    in_win = np.isin(np.arange(len(xyz)), window)
    fill = torch.diff(partition.compression.offsets).cpu().numpy()
    heat = np.repeat(WEIGHT(LogNorm(weights.min(), weights.max())(weights))[:, :3], fill, axis=0)

    figure = plt.figure(figsize=(16, 9), dpi=150, facecolor="white")
    figure.text(0.045, 0.905, "What one query attends to", fontsize=34, fontweight="bold", color=INK, va="center")
    figure.text(0.045, 0.84, subtitle, fontsize=15.5, color=MUTED, va="center")
    names = ["Compression", "Selection", "Window"]
    captions = [
        f"all {len(weights):,} blocks of {partition.compression.size}³, one key each",
        f"{len(chosen)} of {len(selection):,} blocks of {selection.size}³: {in_slc.sum():,} voxels",
        f"its own window of {size}³: {in_win.sum():,} voxels",
    ]
    accents = [to_hex(WEIGHT(0.75)), CHOSEN, WINDOW]
    paints = [heat, *(np.where(hit[:, None], to_rgb(color), body) for hit, color in ((in_slc, CHOSEN), (in_win, WINDOW)))]
    axes = []
    for i, (name, caption, accent, paint) in enumerate(zip(names, captions, accents, paints, strict=True)):
        left = 0.025 + 0.318 * i
        axes.append(figure.add_axes((left, 0.19, 0.314, 0.62)))
        draw_shape(axes[i], xyz, paint, camera)
        figure.text(left + 0.02, 0.15, name, fontsize=23, fontweight="bold", color=accent, va="center")
        figure.text(left + 0.02, 0.1, caption, fontsize=15, color=INK, va="center")
    draw_group(axes[1], xyz[in_slc], CHOSEN, low_slc, selection.size, camera)
    draw_group(axes[2], xyz[in_win], WINDOW, low_win, size, camera)
    for ax in axes:
        draw_query(ax, xyz[query], camera)
    draw_scale(figure, weights * len(weights))
    figure.savefig(path)
    plt.close(figure)


def draw_scale(figure: Figure, share: np.ndarray) -> None:
    """The colour ramp beside the first panel's name; share [C]: weights over their mean."""
    ramp = figure.add_axes((0.24, 0.144, 0.06, 0.014))
    ramp.imshow(np.linspace(0, 1, 256)[None], cmap=WEIGHT, aspect="auto")
    ramp.set_axis_off()
    label: dict[str, Any] = dict(fontsize=11.5, color=MUTED, va="center")
    figure.text(0.236, 0.15, f"{share.min():.2f}×", ha="right", **label)
    figure.text(0.304, 0.15, f"{share.max():.2f}×", ha="left", **label)
    figure.text(0.27, 0.174, "weight / mean weight", ha="center", **label)
