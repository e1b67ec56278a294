"""Muon beside AdamW: which weights get which, what a step is, and a state that comes back."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference_model.optimizers import Optimizers, StackedMuon
from reference_model.train_settings import TrainSettings

MUON = TrainSettings(steps=1, lr=0.01, optimizer="muon")


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(27, 16, 24))
        self.matrix = nn.Parameter(torch.randn(48, 32))
        self.narrow = nn.Parameter(torch.randn(40, 15))
        self.bias = nn.Parameter(torch.randn(40))

    def draw(self, seed: int) -> None:
        """Random gradients."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def train(model: Mixed, optimizer: Optimizers, steps: range) -> None:
    for step in steps:
        model.draw(step)
        optimizer.step(0.02)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["kernel", "matrix"])
def test_a_step_of_muon_is_orthogonal(name: str) -> None:
    """The first one along the nearest orthogonal matrix of the gradient; its five iterations leave singular values of 0.7 to 1.2."""
    model = Mixed()
    before = getattr(model, name).detach().flatten(0, -2).clone()
    optimizer = Optimizers(model.parameters(), MUON)
    model.draw(1)
    u, s, vh = torch.linalg.svd(getattr(model, name).grad.flatten(0, -2), full_matrices=False)
    optimizer.step(0.02)
    step = (before - getattr(model, name).detach().flatten(0, -2)) / (0.02 * 0.2 * max(before.shape) ** 0.5)
    assert 0.6 < torch.linalg.svdvals(step).min() and torch.linalg.svdvals(step).max() < 1.3
    assert float((step * (u @ vh)).sum()) > 0.98 * float(step.norm() * len(s) ** 0.5)


def test_steps_are_those_of_torch() -> None:
    """Several matrices of a shape, tall and wide: up to the rounding of bf16, in which both iterate."""
    shapes = [(16, 48), (48, 16), (16, 48), (32, 32), (32, 32), (64, 16)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    pair = (StackedMuon(ours, 0.1, 0.1), torch.optim.Muon(theirs, 0.1, 0.1, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for p, q, x in zip(ours, theirs, start, strict=True):
        assert (p - q).abs().max() < 0.02 * (q - x).abs().max()


def test_matrices_of_a_shape_share_operations() -> None:
    """As counted by the dispatcher, without views."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += not function.is_view
            return function(*args, **(kwargs or {}))

    def count(optimizer: torch.optim.Optimizer) -> int:
        optimizer.step()
        with Count() as counted:
            optimizer.step()
        return counted.operations

    weights = [torch.randn(16, 32) for _ in range(20)]
    for weight in weights:
        weight.grad = torch.randn(16, 32)
    assert count(StackedMuon(weights, 0.1, 0.0)) < 0.1 * count(torch.optim.Muon(weights, 0.1, 0.0))


def test_the_rest_takes_steps_of_adamw() -> None:
    model, plain = Mixed(), Mixed()
    optimizer = Optimizers(model.parameters(), MUON)
    adamw = torch.optim.AdamW([plain.narrow, plain.bias], 0.02, MUON.betas, weight_decay=0.0)
    for step in range(3):
        model.draw(step)
        plain.draw(step)
        optimizer.step(0.02)
        adamw.step()
    assert torch.equal(model.narrow, plain.narrow) and torch.equal(model.bias, plain.bias)
    assert not torch.equal(model.matrix, plain.matrix)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_state_comes_back(name: str) -> None:
    settings = TrainSettings(steps=1, lr=0.01, optimizer=name)
    straight = Mixed()
    optimizer = Optimizers(straight.parameters(), settings)
    train(straight, optimizer, range(2))
    again, kept = copy.deepcopy(straight), optimizer.state()
    kept = {name: x.clone() for name, x in kept.items()}
    train(straight, optimizer, range(2, 4))
    optimizer = Optimizers(again.parameters(), settings)
    optimizer.load_state(kept)
    train(again, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))


def test_a_state_of_another_optimizer_is_refused() -> None:
    model = Mixed()
    optimizer = Optimizers(model.parameters(), MUON)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="1 optimisers is wanted, got 1/0"):
        Optimizers(model.parameters(), TrainSettings(steps=1)).load_state(optimizer.state())


def test_parameters_without_a_gradient_stay() -> None:
    model = Mixed()
    optimizer = Optimizers(model.parameters(), MUON)
    model.draw(0)
    model.kernel.grad = None
    before = model.kernel.detach().clone()
    optimizer.step(0.02)
    assert torch.equal(model.kernel, before)
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        TrainSettings(steps=1, optimizer="sgd")
