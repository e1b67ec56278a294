"""Rows, neighbours and tiles of the levels against look-ups by coordinate."""

import pytest
import torch
from vae_inputs import GRID, random_latents, random_level

from reference_model.vae_grid import Level, check_latents, find_latent_neighbors, slot_coords, slots_of_children

TAPS = [(dx, dy, dz) for dz in (-1, 0, 1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
LEVELS = [(1, None), (2, None), (2, 0.5), (4, None), (4, 0.3), (8, None), (8, 0.2)]


def rows_by_place(level):
    return {tuple(c): i for i, c in enumerate(level.coords.tolist())}


@pytest.mark.parametrize(("edge", "share"), LEVELS)
def test_rows_and_neighbors(edge, share):
    level = random_level(edge, share)
    rows = rows_by_place(level)
    assert len(rows) == len(level) == len(level.coords)
    expected = [[rows.get((b, x + dx, y + dy, z + dz), -1) for dx, dy, dz in TAPS] for b, x, y, z in level.coords.tolist()]
    assert level.neighbors.tolist() == expected and level.neighbors.dtype == torch.int32
    assert level.count_pairs() == sum(row >= 0 for line in expected for row in line)


@pytest.mark.parametrize(("edge", "share"), LEVELS)
def test_halo_and_raster(edge, share):
    level = random_level(edge, share)
    rows = rows_by_place(level)
    steps = range(-1, edge + 1)
    expected = [
        [rows.get((b, x * edge + i, y * edge + j, z * edge + k), -1) for i in steps for j in steps for k in steps]
        for b, x, y, z in level.latents.tolist()
    ]
    assert level.halo.tolist() == expected
    places = level.raster
    cell = level.latents[places // edge**3]
    local = torch.stack((places % edge**3 // edge**2, places // edge % edge, places % edge), 1)
    assert torch.equal(torch.cat((cell[:, :1], cell[:, 1:] * edge + local), 1).int(), level.coords)


def test_slots_nest():
    for edge in (2, 4, 8):
        fine, coarse = slot_coords(edge, torch.device("cpu")), slot_coords(edge // 2, torch.device("cpu"))
        assert len(fine.unique(dim=0)) == edge**3 and fine.min() == 0 and fine.max() == edge - 1
        assert torch.equal(fine // 2, coarse.repeat_interleave(8, 0))
    child = (slot_coords(8, torch.device("cpu")) * torch.tensor([64, 8, 1])).sum(1)
    assert torch.equal(slots_of_children(torch.device("cpu"))[child], torch.arange(512))


def test_latents_are_checked():
    latents = random_latents(20)
    check_latents(latents, GRID)
    check_latents(latents[:0], GRID)
    cases = [(latents.flip(0), "lexicographic"), (latents[[0, 0]], "unique"), (latents[:, :3], r"\[L,4\]"), (latents.float(), "int")]
    for broken, rule in cases:
        with pytest.raises(ValueError, match=rule):
            check_latents(broken, GRID)
    with pytest.raises(ValueError, match="lie in"):
        check_latents(latents, 3)


def test_no_latents():
    latents = torch.empty(0, 4, dtype=torch.int32)
    level = Level.of(latents, find_latent_neighbors(latents, GRID), 4)
    assert len(level) == 0 and level.neighbors.shape == (0, 27) and level.halo.shape == (0, 216) and level.coords.shape == (0, 4)
