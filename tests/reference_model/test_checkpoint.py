"""Checkpoints: all of the state and back, whole or not at all."""

import pytest
import torch
from torch import nn

from reference_model.checkpoint import git_commit, list_checkpoints, load_checkpoint, read_header, save_checkpoint
from reference_model.optimizers import Optimizers
from reference_model.train_settings import TrainSettings


def trained(steps: int) -> tuple[nn.Module, nn.Module, Optimizers]:
    model, ema = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = Optimizers(model.parameters(), TrainSettings(steps=1, lr=0.1))
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step(0.1)
    return model, ema, optimizer


def test_everything_comes_back(tmp_path) -> None:
    model, ema, optimizer = trained(3)
    state, card = {"step": 3, "seconds": 1.5, "totals": {"tokens": 7}}, {"config": {"lr": 0.1}, "commit": git_commit()}
    path = save_checkpoint(tmp_path, model, ema, optimizer, state, card)
    assert read_header(path) == (state, card) and len(card["commit"]) >= 7
    other = trained(0)
    assert load_checkpoint(path, *other) == state
    for a, b in zip((model, ema), other, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    old, new = optimizer.state(), other[2].state()
    assert set(old) == set(new) and len(old) == 4 * 3  # step and two averages of each parameter
    assert all(torch.equal(x, new[name]) for name, x in old.items())


def test_only_the_newest_stay(tmp_path) -> None:
    objects = trained(1)
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, *objects, {"step": step}, {}, keep=2)
    assert [read_header(path)[0]["step"] for path in list_checkpoints(tmp_path)] == [10, 100]
    (tmp_path / ".step_00000200.safetensors.part").write_bytes(b"half")  # what a killed process leaves
    assert len(list_checkpoints(tmp_path)) == 2


def test_other_files_and_other_models_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "a").write_bytes(b"no safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b", {"format": "else"})
    for name in "ab":
        with pytest.raises(ValueError, match="not a checkpoint"):
            read_header(tmp_path / name)
    path = save_checkpoint(tmp_path, *trained(1), {"step": 1}, {})
    wide = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(path, wide, wide, Optimizers(wide.parameters(), TrainSettings(steps=1)))
