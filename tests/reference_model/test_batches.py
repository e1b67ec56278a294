"""Batches that follow from their number: what they hold, who makes them, and how often each volume comes."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
import torch
from analytic import sphere, volume_of

from reference_model.batches import BatchStream, PreparedSource, ShapeSource
from reference_model.dataset import PreparedVolume, VolumeBatch
from reference_model.volume import RESAMPLING_MARGIN, Volume, load_volume, save_volume


@dataclass(frozen=True)
class Numbered:
    """Volumes of known token counts, cheap to make; meta tells which one it was."""

    tokens: tuple[int, ...]
    identity: str = "numbered"

    def draw(self, rng: np.random.Generator, resolution: int) -> Volume:
        index = int(rng.integers(len(self.tokens)))
        latents = torch.arange(self.tokens[index], dtype=torch.int32)[:, None] * torch.tensor([[1, 0, 0]], dtype=torch.int32)
        n = len(latents)
        return Volume(
            resolution, latents * 8, torch.zeros(n), torch.zeros(n, dtype=torch.bool), latents, torch.arange(n, dtype=torch.int32),
            torch.zeros(n, 512, dtype=torch.bool), meta={"index": str(index)},
        )  # fmt: skip


def equal(a: VolumeBatch, b: VolumeBatch) -> bool:
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def batch_of(stream: BatchStream, number: int) -> VolumeBatch:
    return stream[number].to("cpu")


STREAM = BatchStream([(Numbered((1, 4, 6)), 1.0)], (64, 64, 64, 128), tokens=10, max_tokens=5, seed=7)


def test_a_batch_follows_from_its_number() -> None:
    again = replace(STREAM)
    assert all(equal(batch_of(STREAM, i), batch_of(again, i)) for i in (0, 5, 3))
    assert not equal(batch_of(STREAM, 0), batch_of(STREAM, 1)) and not equal(batch_of(STREAM, 0), batch_of(replace(STREAM, seed=8), 0))


def test_batches_reach_the_budget_and_drop_large_volumes() -> None:
    batches = [batch_of(STREAM, i) for i in range(200)]
    assert all(10 <= b.counts["tokens"] < 15 for b in batches)
    kinds = Counter(m["index"] for b in batches for m in b.meta)
    dropped = sum(b.counts["dropped"] for b in batches)
    draws = dropped + kinds.total()
    assert kinds["2"] == 0 and dropped == pytest.approx(draws / 3, rel=0.1)
    assert kinds["0"] == pytest.approx(kinds["1"], rel=0.1)  # size does not decide how often a volume comes
    assert Counter(b.resolution for b in batches)[64] == pytest.approx(150, abs=20)


def test_ranks_share_the_resolution_and_nothing_else() -> None:
    other = replace(STREAM, rank=1)
    pairs = [(batch_of(STREAM, i), batch_of(other, i)) for i in range(20)]
    assert all(a.resolution == b.resolution for a, b in pairs) and {a.resolution for a, _ in pairs} == {64, 128}
    assert not any(equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_anywhere(workers: int) -> None:
    batches = list(islice(STREAM.loader(4, workers), 5))
    assert all(equal(batch.to("cpu"), batch_of(STREAM, 4 + i)) for i, batch in enumerate(batches))


def test_weights_of_sources_and_hash() -> None:
    mixed = BatchStream([(Numbered((1,)), 3.0), (Numbered((2,)), 1.0), (Numbered((3,)), 0.0)], (64,), tokens=100, max_tokens=5)
    counts = Counter(n for i in range(20) for n in batch_of(mixed, i).cu_latents.diff().tolist())
    assert counts[1] / counts[2] == pytest.approx(3, rel=0.2) and counts[3] == 0
    assert mixed.data_hash() == replace(mixed, seed=9, tokens=5).data_hash() != replace(mixed, resolutions=(128,)).data_hash()
    with pytest.raises(ValueError, match="sources need weights"):
        replace(mixed, sources=[(Numbered((1,)), 0.0)])
    with pytest.raises(ValueError, match="200 draws in a row at resolution=64 .* of self.max_tokens=1"):
        replace(STREAM, resolutions=(64,), max_tokens=1, sources=[(Numbered((2, 3)), 1.0)])[0]


def test_draws_that_make_no_volume_are_counted(monkeypatch) -> None:
    from reference_model import shapes

    def make_shape(family: str, seed: int):
        if family == "tray":
            raise ValueError("makes no closed solid")
        return original(family, seed)

    original = shapes.make_shape
    monkeypatch.setattr(shapes, "make_shape", make_shape)
    stream = BatchStream([(ShapeSource(("tray", "bracket"), 1), 1.0)], (64,), tokens=800, max_tokens=10**6)
    batch = batch_of(stream, 1)
    assert batch.counts["dropped"] > 0 and {m["source"] for m in batch.meta} == {"bracket_000000"}
    with pytest.raises(ValueError, match="200 draws in a row .* tray 0 at 64: makes no closed solid"):
        replace(stream, sources=[(ShapeSource(("tray",), 1), 1.0)])[0]


def prepared(volume: Volume, path, name: str) -> PreparedVolume:
    save_volume(volume, path)
    return PreparedVolume(path, name, name, "train", volume.resolution, len(volume.latents), len(volume.coords))


def test_prepared_volumes_come_at_their_resolution_and_turned(tmp_path) -> None:
    made = {r: volume_of(sphere(0.3, (0.2, 0.1, 0.0)), r) for r in (64, 128)}
    source = PreparedSource(tuple(prepared(v, tmp_path / f"{r}.safetensors", str(r)) for r, v in made.items()))
    stored = load_volume(tmp_path / "128.safetensors")
    assert torch.equal(source.draw(np.random.default_rng(0), 128).unpack().values, stored.values)
    plain = BatchStream([(source, 1.0)], (128,), tokens=1, max_tokens=10**6, symmetries=False)
    assert torch.equal(batch_of(plain, 3).values, stored.values)
    turned = [batch_of(replace(plain, symmetries=True), i) for i in range(12)]
    motions = {b.meta[0]["symmetry"] for b in turned}
    assert len(motions) > 6 and all(len(b.values) == len(stored.values) for b in turned)
    assert plain[3].symmetries == () and "symmetry" not in batch_of(plain, 3).meta[0]
    with pytest.raises(ValueError, match="needs volumes"):
        PreparedSource(())


def test_the_finest_volumes_give_other_resolutions(tmp_path) -> None:
    fine, exact = (volume_of(sphere(0.08), r, margin=m) for r, m in ((320, RESAMPLING_MARGIN), (256, 0.0)))
    source = PreparedSource((prepared(fine, tmp_path / "fine", "fine"),))
    drawn = source.draw(np.random.default_rng(0), 256)
    assert drawn.resolution == 256 and torch.equal(drawn.latents, exact.latents)
    assert abs(len(drawn.values) - len(exact.values)) < 0.02 * len(exact.values)
    same = source.draw(np.random.default_rng(0), 320)
    assert same.margin == 0 and same.values.abs().max() <= 1 and len(same.values) < len(fine.values)
    bare = PreparedSource((prepared(volume_of(sphere(0.08), 320), tmp_path / "bare", "bare"),))
    with pytest.raises(ValueError, match="the source must hold"):
        bare.draw(np.random.default_rng(0), 256)


def test_shapes_are_kept_and_the_same_when_read(tmp_path) -> None:
    source = ShapeSource(("bracket", "tray"), count=3, first=10, cache=tmp_path / "cache")
    first = source.draw(np.random.default_rng(1), 64)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith(first.meta["source"]) and path.name.endswith("_64.safetensors")
    changed = path.stat().st_mtime_ns
    second = source.draw(np.random.default_rng(1), 64)
    assert torch.equal(first.values, second.values) and path.stat().st_mtime_ns == changed
    fresh = replace(source, cache=None).draw(np.random.default_rng(1), 64)
    torch.testing.assert_close(fresh.values, first.values, rtol=0, atol=2e-5)
    seeds = {int(source.draw(np.random.default_rng(i), 64).meta["source"].split("_")[1]) for i in range(8)}
    assert seeds <= {10, 11, 12} and len(seeds) > 1
