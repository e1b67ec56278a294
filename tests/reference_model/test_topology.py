"""The Euler characteristic of marching cubes, cell by cell, against that of the mesh."""

import pytest
import torch

from reference_model.extract import extract_mesh
from reference_model.tiles import lattice
from reference_model.topology import euler, parities, places_round

GRID = 4  # cells an edge, of which those on the rim are solid outside


def noise(seed: int, rough: float) -> torch.Tensor:
    """[L,512] values of the GRID^3 cells, rough noise in their middle, so that surfaces have handles, bubbles and ambiguous faces."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, *(8 * GRID,) * 3, generator=generator)
    smooth = torch.nn.functional.avg_pool3d(x, 5, 1, 2)
    x = (smooth / smooth.std() + rough * x)[0, 0]
    x[[0, 1, -1, -2]] = x[:, [0, 1, -1, -2]] = x[:, :, [0, 1, -1, -2]] = 1.0
    return x.view(GRID, 8, GRID, 8, GRID, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 512)


def characteristic(values: torch.Tensor) -> int:
    coords = (lattice(GRID)[:, None] * 8 + lattice(8)).flatten(0, 1).int()
    vertices, faces, report = extract_mesh(coords, values.flatten(), 8 * GRID)
    assert report.open_vertices == 0
    return len(vertices) - len(faces) // 2


@pytest.mark.parametrize("rough", [0.02, 1.0])
def test_changes_add_up(rough):
    """From one surface to another, parity after parity."""
    latents = lattice(GRID)
    both, other = noise(0, rough).repeat(2, 1), noise(1, rough)
    state = both[: len(latents)]
    places, parity = places_round(latents, 8 * GRID), parities(latents)
    begin, end, changes = characteristic(state), characteristic(other), 0
    for i in range(8):
        rows = parity == i
        before = euler(both.flatten()[places[rows]])
        state[rows] = other[rows]
        changes += (euler(both.flatten()[places[rows]]) - before).sum().item()
    assert begin != end and changes == 4 * (end - begin)


def test_cells_change_it_alone():
    """Each by itself, as much as the mesh of the whole says."""
    latents, truth, other = lattice(GRID), noise(0, 0.1), noise(1, 0.1)
    places, before = places_round(latents, 8 * GRID), characteristic(truth)
    for cell in (21, 22, 37, 42):
        changed = truth.clone()
        changed[cell] = other[cell]
        around = places[cell : cell + 1]
        change = euler(torch.cat((changed, truth)).flatten()[around]) - euler(truth.repeat(2, 1).flatten()[around])
        assert change.item() == 4 * (characteristic(changed) - before)


def test_cells_of_one_parity_do_not_touch():
    latents = lattice(6)
    for i in range(8):
        chosen = latents[parities(latents) == i]
        apart = (chosen[:, None] - chosen).abs().amax(2) + 9 * torch.eye(len(chosen)).long()
        assert len(chosen) == 27 and apart.min() >= 2


def test_what_lies_round_a_cell():
    """Against plain arithmetic; beyond the latents a cell goes on, in the second half."""
    latents = lattice(3)[torch.randperm(27, generator=torch.Generator().manual_seed(0))[:15].sort().values]
    places = places_round(latents, 24)
    rows = {tuple(cell): i for i, cell in enumerate(latents.tolist())}
    for row, cell in enumerate(latents.tolist()):
        for place, step in zip(places[row].tolist(), (lattice(10) - 1).tolist(), strict=True):
            voxel = [8 * c + s for c, s in zip(cell, step, strict=True)]
            there = tuple(v // 8 for v in voxel)
            begin = 0
            if there not in rows:
                there, voxel = tuple(cell), [8 * c + min(max(s, 0), 7) for c, s in zip(cell, step, strict=True)]
                begin = len(latents) * 512
            x, y, z = (v % 8 for v in voxel)
            assert place == begin + rows[there] * 512 + (x * 8 + y) * 8 + z


def test_nothing_at_all():
    assert euler(torch.zeros(0, 1000)).shape == (0,) and places_round(torch.zeros(0, 3).int(), 32).shape == (0, 1000)
