from dataclasses import fields, replace

import pytest
import torch
from analytic import box, box_edge_distance, rotation, sphere, volume_of

from reference_model.dataset import collate_volumes
from reference_model.symmetry import apply_symmetry, symmetries, turn_batch

HALF, FRAME = (0.3, 0.2, 0.12), rotation(5)
SHIFT = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)


def shape(p):  # no symmetry of its own
    return torch.minimum(box(HALF, FRAME)(p - SHIFT), sphere(0.15, (-0.4, 0.2, -0.1))(p))


def edges(p):
    return box_edge_distance(HALF, FRAME)(p - SHIFT)


def test_the_matrices_are_the_group_of_the_cube():
    group = symmetries()
    assert torch.equal(group[0], torch.eye(3, dtype=torch.int64))
    assert len(group.flatten(1).unique(dim=0)) == 48
    assert torch.det(group.double()).tolist() == [1] * 24 + [-1] * 24
    assert torch.equal(group @ group.mT, group[:1].expand(48, 3, 3))
    products = (group[:, None] @ group).flatten(0, 1).flatten(1)
    assert len(torch.cat((products, group.flatten(1))).unique(dim=0)) == 48


@pytest.mark.parametrize("index", range(48))
def test_a_moved_volume_equals_the_volume_of_the_moved_shape(index):
    motion = symmetries()[index].double()  # x' = M x, rows: p' = p M^T, p = p' M
    moved = apply_symmetry(SOURCE, index)
    direct = volume_of(lambda p: shape(p @ motion), 256, edges=lambda p: edges(p @ motion))
    for name in ("coords", "sharp", "latents", "latent_index", "inside"):
        assert torch.equal(getattr(moved, name), getattr(direct, name)), name
    assert (moved.values - direct.values).abs().max() < 1e-6
    assert moved.meta["symmetry"] == str(index)


def test_motions_compose():
    group = symmetries()
    twice = apply_symmetry(apply_symmetry(SOURCE, 7), 30)
    assert torch.equal(group[int(twice.meta["symmetry"])], group[30] @ group[7])
    once = apply_symmetry(SOURCE, int(twice.meta["symmetry"]))
    assert torch.equal(twice.coords, once.coords) and torch.equal(twice.values, once.values)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("indices", [(31, 0, 8), ()])
def test_a_batch_is_turned_volume_by_volume(indices, device):
    volumes = [SOURCE, volume_of(sphere(0.2, (0.3, 0.1, 0.0)), 256), SOURCE]
    turned = turn_batch(replace(collate_volumes(volumes), dropped=3), indices, device)
    moved = [apply_symmetry(v, i) for v, i in zip(volumes, indices, strict=True)] if indices else volumes
    expected = replace(collate_volumes(moved), dropped=3)
    for field in fields(expected):
        got, want = getattr(turned, field.name), getattr(expected, field.name)
        if torch.is_tensor(want):
            assert got.device.type == device and torch.equal(got.cpu(), want), field.name
        else:
            assert got == want, field.name


@pytest.mark.parametrize("index", [-1, 48])
def test_other_indices_are_refused(index):
    with pytest.raises(ValueError, match="index must be in"):
        apply_symmetry(SOURCE, index)
    with pytest.raises(ValueError, match=r"one a sample, got \[1, 2\] for 1"):
        turn_batch(collate_volumes([SOURCE]), [1, 2], "cpu")


SOURCE = volume_of(shape, 256, edges=edges)
