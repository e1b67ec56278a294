"""The trainer on a toy model: against a plain loop, killed and resumed, with bad steps, and on two ranks."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from toy_training import SETTINGS, Toy, ToyBatch, toy_batch, toy_batches

from reference_model.checkpoint import list_checkpoints
from reference_model.train_settings import TrainSettings
from reference_model.trainer import Trainer

CARD = {"config": "toy", "data_hash": "0"}
TOY = Path(__file__).with_name("toy_training.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TOY.parents[2]), "OMP_NUM_THREADS": "1"}
CURVE = ("step", "kind", "norm", "fit", "size", "total", "lr", "dropped", "skipped")


def curve(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in CURVE if name in row} for row in rows]


def seeded(seed: int, step: int, rank: int = 0, size: int = 1) -> torch.Generator:
    number = ((seed << 32) + step) * size + rank
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


def plain_run(steps: int, ranks: int = 1) -> tuple[Toy, Toy, list[float]]:
    """What `steps` steps should do, written out: mean gradient of the ranks, clipped, AdamW, cosine after a warm-up, EMA."""
    model = Toy().train()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    losses = []
    for step in range(steps):
        rate = SETTINGS.lr * min(1, (step + 1) / SETTINGS.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total = 0.0
        for rank in range(ranks):
            loss = model.loss(toy_batch(step, rank), seeded(SETTINGS.seed, step, rank, ranks))["total"] / ranks
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip)
        optimizer.step()
        decay = min(SETTINGS.ema, (1 + step) / (10 + step))
        for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
            slow.data = decay * slow.data + (1 - decay) * fast.data
    return model, ema, losses


def assert_same(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 1e-6) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def test_steps_equal_a_plain_loop(tmp_path) -> None:
    trainer = Trainer(Toy(), toy_batches, SETTINGS, tmp_path, card=CARD)
    rows = trainer.run()
    model, ema, losses = plain_run(SETTINGS.steps)
    assert_same(trainer.model, model)
    assert_same(trainer.ema, ema)
    assert [row["total"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert rows[-1]["step"] == SETTINGS.steps and all({"fit", "size", "tokens/s", "loader_wait", "norm", "lr"} <= set(r) for r in rows)
    assert rows[-1]["dropped"] == SETTINGS.steps


def test_rates() -> None:
    cosine = TrainSettings(steps=100, lr=2.0, warmup=10)
    assert [cosine.rate(step, 0) for step in (0, 50, 100)] == pytest.approx([0.2, 1.0, 0.0])
    timed = TrainSettings(steps=100, lr=2.0, schedule_minutes=2.0)
    assert [timed.rate(3, seconds) for seconds in (0, 60, 120, 500)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert not timed.is_over(119, 119) and timed.is_over(120, 0) and not cosine.is_over(1e9, 1e9)
    call = TrainSettings(steps=100, minutes=1.0, schedule_minutes=2.0)
    assert call.is_over(60, 60) and not call.is_over(100, 40)
    constant = TrainSettings(steps=100, lr=2.0, warmup=4, schedule="constant")
    assert [constant.rate(step, 0) for step in (0, 1, 50, 99)] == pytest.approx([0.5, 1.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="schedule='linear'"):
        TrainSettings(steps=1, schedule="linear")


def test_killed_run_resumes_on_the_same_curve(tmp_path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([sys.executable, TOY, straight, "20"], check=True, env=ENVIRONMENT, capture_output=True)
    process = subprocess.Popen([sys.executable, TOY, killed, "20", "0.05"], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not ((killed / "log.jsonl").exists() and len(curve(killed)) >= 10):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    saved = [int(path.stem.split("_")[1]) for path in list_checkpoints(killed / "checkpoints")]
    assert saved and saved[-1] < 20
    done = subprocess.run([sys.executable, TOY, killed, "20"], check=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert f"{saved[-1]}/20" in done.stderr  # it went on, it did not begin anew
    assert curve(killed) == curve(straight)
    first, second = (torch.load(folder / "rank0.pt") for folder in (straight, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_ranks_average_their_gradients(tmp_path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOY), str(tmp_path), "12"]
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, ema, losses = plain_run(12, ranks=2)
    result = Toy()
    result.load_state_dict(first)
    assert_same(result, model)
    rows = curve(tmp_path)
    assert [row["total"] for row in rows if row["kind"] == "train"] == pytest.approx(losses, rel=1e-5)
    assert rows[-1]["kind"] == "validation"
    expected = [float(ema.eval().loss(toy_batch(-1 - i), torch.Generator().manual_seed(i))["fit"].detach()) for i in range(3)]
    assert rows[-1]["fit"] == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_utilisation_counts_forward_and_backward(tmp_path) -> None:
    asked = []

    def flops(batch: ToyBatch) -> float:
        asked.append(batch)
        return 1e9 * len(batch.x)

    settings = replace(SETTINGS, steps=9, peak_tflops=2.0, validate_every=4)
    trainer = Trainer(Toy(), toy_batches, settings, tmp_path, flops=flops, validation=[toy_batch(-1)], card=CARD)
    rows = [row for row in trainer.run() if row["kind"] == "train"]
    assert len(asked) == 3 and "mfu" not in rows[0]  # at the first row and after each validation but the last
    assert rows[1]["mfu"] == pytest.approx(3 * 1e9 * rows[1]["tokens/s"] / 2e12)


def test_speed_leaves_out_validation(tmp_path) -> None:
    settings = replace(SETTINGS, steps=8, log_every=4, validate_every=3)
    trainer = Trainer(Toy(), toy_batches, settings, tmp_path, validation=[toy_batch(-1)], picture=lambda *_: time.sleep(0.5), card=CARD)
    rows = [row for row in trainer.run() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [4, 8] and all(row["seconds_a_step"] < 0.12 for row in rows)
    assert all(row["tokens/s"] * row["seconds_a_step"] == pytest.approx(16) for row in rows)
    assert trainer.state.seconds > 1.0


def poisoned(bad: range):
    def batches(start: int):
        for number, batch in enumerate(toy_batches(start), start):
            yield ToyBatch(batch.x * float("nan")) if number in bad else batch

    return batches


def test_bad_steps_are_skipped_and_counted(tmp_path) -> None:
    settings = replace(SETTINGS, steps=12, max_skipped=4)
    seen = []

    class Watched(Toy):
        def loss(self, batch, generator=None):
            seen.append(copy.deepcopy(self.net))
            return super().loss(batch, generator)

    trainer = Trainer(Watched(), poisoned(range(5, 8)), settings, tmp_path / "a", card=CARD)
    rows = trainer.run()
    assert rows[-1]["skipped"] == 3 and math.isfinite(rows[-1]["total"]) and math.isnan(rows[6]["total"])
    assert_same(seen[5], seen[8], 0.0)
    assert not torch.equal(seen[8][0].weight, seen[9][0].weight)
    with pytest.raises(FloatingPointError, match="4 steps in a row"):
        Trainer(Toy(), poisoned(range(5, 9)), settings, tmp_path / "b", card=CARD).run()


def test_time_limit_stops_and_saves(tmp_path) -> None:
    settings = replace(SETTINGS, steps=10**6, save_every=10**6, minutes=0.01)
    trainer = Trainer(Toy(), lambda start: toy_batches(start, pause=0.02), settings, tmp_path, card=CARD)
    trainer.run()
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    assert 0.6 <= trainer.state.seconds < 10 and saved.name == f"step_{trainer.state.step:08d}.safetensors"
    again = Trainer(Toy(), toy_batches, replace(settings, minutes=None, steps=trainer.state.step + 2), tmp_path, card=CARD)
    assert again.run()[-1]["step"] == trainer.state.step + 2


def test_validation_uses_the_ema_and_shows_a_picture(tmp_path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = []

    def picture(model, path):
        shown.append(copy.deepcopy(model))
        Image.new("RGB", (6, 4), (1, 2, 3)).save(path)

    settings = replace(SETTINGS, steps=10, validate_every=5)
    batches = list(islice(toy_batches(500), 4))
    trainer = Trainer(Toy(), toy_batches, settings, tmp_path, validation=batches, picture=picture, card=CARD)
    rows = [row for row in trainer.run() if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == [0, 5, 10] and len(shown) == 3
    assert_same(shown[0], Toy(), 0)
    terms = [shown[1].loss(batch, torch.Generator().manual_seed(i)) for i, batch in enumerate(batches)]
    assert rows[1]["size"] == pytest.approx(float(sum(t["size"] for t in terms).detach()) / 4, rel=1e-6)
    assert not shown[1].training and (tmp_path / "pictures" / "step_00000005.png").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/total")] == list(range(1, 11))
    assert [e.value for e in events.Scalars("validation/size")] == pytest.approx([row["size"] for row in rows])
    assert [(image.step, image.width) for image in events.Images("validation/picture")] == [(0, 6), (5, 6), (10, 6)]


def test_bf16_and_fp32_differ_a_little(tmp_path) -> None:
    runs = [
        Trainer(Toy(), toy_batches, replace(SETTINGS, precision=p), tmp_path / p, card=CARD).run()[-1]["total"] for p in ("bf16", "fp32")
    ]
    assert runs[0] != runs[1] and runs[0] == pytest.approx(runs[1], rel=0.05)


@pytest.mark.parametrize("name", ["config", "data_hash"])
def test_another_run_in_the_same_folder_is_refused(tmp_path, name: str) -> None:
    Trainer(Toy(), toy_batches, replace(SETTINGS, steps=4), tmp_path, card=CARD).run()
    with pytest.raises(ValueError, match=f"another {name}"):
        Trainer(Toy(), toy_batches, SETTINGS, tmp_path, card={**CARD, name: "other"})
