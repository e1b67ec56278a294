"""A flood through the voxels of a volume: pieces of inside or outside too small for the grid, slivers between faces that overlap."""

import numpy as np

from reference_model.cli import optional_import
from reference_model.volume import CELL

_MOST = 27  # voxels: three across


def find_specks(latents: np.ndarray, inside: np.ndarray, resolution: int) -> tuple[np.ndarray, int]:
    """Voxels of pieces, joined through faces of voxels, that have at most 27: [L,512] bool, and the number of pieces.

    latents [L,3] lexicographic, inside [L,512] bool. What meets a cell that is no latent goes on there and is no speck.
    """
    ndimage, graphs = optional_import("scipy.ndimage"), optional_import("scipy.sparse")
    sign = inside.reshape(-1, CELL, CELL, CELL)
    within_tile = np.zeros((3, 3, 3, 3), np.bool_)
    within_tile[1] = ndimage.generate_binary_structure(3, 1)
    piece, count = ndimage.label(sign, within_tile)
    other, more = ndimage.label(~sign, within_tile)
    np.copyto(piece, other + count, where=~sign)
    piece -= 1
    count += more
    size = np.bincount(piece.reshape(-1), minlength=count)
    endless = np.zeros(count, np.bool_)
    grid = resolution // CELL + 1
    stride = np.array([grid * grid, grid, 1])
    key = latents.astype(np.int64) @ stride
    links = [np.zeros((2, 0), np.int64)]
    for axis in range(3):
        low, high = np.take(piece, 0, axis + 1).reshape(-1, CELL**2), np.take(piece, CELL - 1, axis + 1).reshape(-1, CELL**2)
        place = np.minimum(np.searchsorted(key, key + stride[axis]), len(key) - 1)
        met = key[place] == key + stride[axis]
        endless[high[~met]] = True
        alone = np.ones(len(key), np.bool_)
        alone[place[met]] = False
        endless[low[alone]] = True
        a, b = high[met], low[place[met]]
        alike = np.take(sign, CELL - 1, axis + 1).reshape(-1, CELL**2)[met] == np.take(sign, 0, axis + 1).reshape(-1, CELL**2)[place[met]]
        links.append(np.stack((a[alike], b[alike])))
    start, end = np.concatenate(links, 1)
    graph = graphs.coo_matrix((np.ones(len(start), np.bool_), (start, end)), (count, count))
    total, whole = graphs.csgraph.connected_components(graph, directed=False)
    small = (np.bincount(whole, size, total) <= _MOST) & (np.bincount(whole, endless, total) == 0)
    return small[whole][piece].reshape(inside.shape), int(small.sum())
