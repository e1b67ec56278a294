"""One trainer for every model: AdamW or Muon, autocast, EMA, clipping, validation, exact resumption, several processes under torchrun.

A model has `loss(batch, generator) -> {"total": scalar, ...}`, or the caller gives one. A batch has `to(device, non_blocking)` and
`counts`, numbers to add up ("tokens" among them). Batches come from `batches(start)`: an endless iterator from batch `start` on, the same
ones every time. What a step does follows from (seed, step, rank) and the state in the checkpoint; with `schedule_minutes` the rate follows
the clock, and no two runs are alike.
"""

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from reference_model.checkpoint import list_checkpoints, load_checkpoint, read_header, save_checkpoint
from reference_model.cli import optional_import
from reference_model.distributed import Ranks
from reference_model.optimizers import Optimizers
from reference_model.train_settings import TrainSettings


class Batch(Protocol):
    @property
    def counts(self) -> Mapping[str, int]: ...

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch": ...


Loss = Callable[[Any, Any, torch.Generator], dict[str, Tensor]]  # model, batch, generator → terms


def own_loss(model: Any, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """The model's loss as it is."""
    return model.loss(batch, generator)


class _Loss(nn.Module):
    """The loss as a forward pass, the form that DistributedDataParallel takes."""

    def __init__(self, model: nn.Module, loss: Loss, precision: str, device: torch.device):
        super().__init__()
        self.model, self.loss, self.precision, self.device = model, loss, precision, device

    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.loss(self.model, batch, generator)


@dataclass
class _State:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    seconds: float = 0.0  # of training, over all calls
    skipped: int = 0
    skipped_in_row: int = 0
    totals: dict[str, int] = field(default_factory=dict)  # counts of all batches of all ranks


class Trainer:
    """Trains `model` (on its device) in `out`; goes on from the newest checkpoint there.

    loss: what is minimised, the model's own by default. flops: batch → operations of one forward pass; asked at the first row and after
    each validation, it gives the utilisation ("mfu"). validation: batches scored with the EMA weights, the same on every rank, before
    the first step, every so many and at the end. picture: called with the EMA model and the path of a PNG that it may write, on the
    first rank, after each validation.
    card: kept in every checkpoint; a checkpoint whose card has another "data_hash" or "config" is refused by a ValueError.
    Writes out/checkpoints, out/log.jsonl, out/tensorboard and out/pictures.
    """

    def __init__(
        self, model: nn.Module, batches: Callable[[int], Iterator[Batch]], settings: TrainSettings, out: Path, *,
        loss: Loss = own_loss, flops: Callable[[Any], float] | None = None, validation: Sequence[Batch] = (),
        picture: Callable[[nn.Module, Path], None] | None = None, card: Mapping[str, Any] | None = None, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.model, self.batches, self.settings, self.out = model, batches, settings, out
        self.validation, self.picture, self.card, self.ranks = validation, picture, dict(card or {}), ranks or Ranks()
        self.device = next(model.parameters()).device
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = Optimizers(self.parameters, settings)
        self.state = _State()
        self.history: list[dict[str, Any]] = []
        if found := list_checkpoints(out / "checkpoints"):
            self._resume(found[-1])
        self.function, self.flops, self.flops_a_token = loss, flops, 0.0
        self.loss = self.ranks.wrap(_Loss(model, loss, settings.precision, self.device), self.device)

    def _resume(self, path: Path) -> None:
        _, card = read_header(path)
        for name in ("config", "data_hash"):
            if card.get(name) != self.card.get(name):
                raise ValueError(f"{path} was made with another {name}: {card.get(name)}, now {self.card.get(name)}; take another out=")
        self.state = _State(**load_checkpoint(path, self.model, self.ema, self.optimizer))
        log = self.out / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
        self.history = [row for row in rows if row["step"] <= self.state.step]

    def run(self) -> list[dict[str, Any]]:
        """Train until `steps`, `schedule_minutes` or `minutes` are over, then save; the rows of log.jsonl are returned.

        FloatingPointError: see max_skipped.
        """
        settings, state = self.settings, self.state
        begin, before = time.perf_counter(), state.seconds
        iterator = self.batches(state.step)
        self._open_log()
        if self.validation and state.step == 0:
            self._validate()  # where the curves begin
        window = _Window()
        with self.ranks.bar(settings.steps, state.step) as bar:
            self.model.train()
            over = settings.is_over(state.seconds, 0.0)
            while not over and state.step < settings.steps:
                waiting = time.perf_counter()
                batch = next(iterator)
                window.wait += time.perf_counter() - waiting
                batch = batch.to(self.device, non_blocking=True)
                terms = self._step(batch, window)
                state.step += 1
                state.seconds = before + self.ranks.from_first(time.perf_counter() - begin)
                over = settings.is_over(state.seconds, state.seconds - before)
                last = over or state.step == settings.steps
                saving = last or state.step % settings.save_every == 0
                if saving or state.step % settings.log_every == 0:
                    bar.set_postfix_str(self._log(window, terms), refresh=False)
                    if self.flops and not self.flops_a_token:
                        self.flops_a_token = self.flops(batch) / max(batch.counts["tokens"], 1)
                    window = _Window()
                pause = time.perf_counter()
                if self.validation and (last or state.step % settings.validate_every == 0):
                    self._validate()
                    self.flops_a_token = 0.0
                if saving:
                    self._save()
                window.begin += time.perf_counter() - pause  # the speed is that of steps
                bar.update()
        return self.history

    def _step(self, batch: Any, window: "_Window") -> dict[str, float]:
        settings, state = self.settings, self.state
        seed = ((settings.seed << 32) + state.step) * self.ranks.size + self.ranks.rank
        torch.manual_seed(seed % 2**63)
        generator = torch.Generator(self.device).manual_seed(seed % 2**63)
        rate = settings.rate(state.step, state.seconds)
        terms = self.loss(batch, generator)
        terms["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        numbers = torch.stack([norm, *(x.detach().float() for x in terms.values())]).tolist()  # the one synchronisation here
        values = dict(zip(("norm", *terms), numbers, strict=True))
        if all(map(math.isfinite, self.ranks.sum(numbers))):
            self.optimizer.step(rate)
            self._follow(min(settings.ema, (1 + state.step) / (10 + state.step)))
            state.skipped_in_row = 0
            window.add(values)
        else:
            state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
        self.optimizer.zero_grad()
        window.count(batch, rate)
        if state.skipped_in_row >= settings.max_skipped:
            raise FloatingPointError(f"{state.skipped_in_row} steps in a row were not finite, the last one {values}")
        return values

    def _follow(self, decay: float) -> None:
        """One step of the exponential moving average."""
        with torch.no_grad():
            own: list[Tensor] = list(self.model.parameters())
            moving: list[Tensor] = list(self.ema.parameters())
            torch._foreach_lerp_(moving, own, 1 - decay)
            for slow, fast in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                slow.copy_(fast)

    def _open_log(self) -> None:
        if self.ranks.rank:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")
        optional_import("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.state.step + 1 if self.state.step else None)

    def _write(self, kind: str, values: Mapping[str, float]) -> None:
        row = {"step": self.state.step, "kind": kind, **values}
        self.history.append(row)
        if self.ranks.rank == 0:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, self.state.step)
            self.board.flush()

    def _log(self, window: "_Window", last: Mapping[str, float]) -> str:
        """One row: means over the window and the ranks; a window without a finite step repeats the last values."""
        seconds = time.perf_counter() - window.begin
        ranks, names = self.ranks, sorted(last)
        sums = ranks.sum([window.terms[name] for name in names])
        steps = max(window.finite, 1) * ranks.size
        row = {name: value / steps if window.finite else last[name] for name, value in zip(names, sums, strict=True)}
        counted = dict(zip(sorted(window.counts), ranks.sum([float(window.counts[name]) for name in sorted(window.counts)]), strict=True))
        for name, value in counted.items():
            self.state.totals[name] = self.state.totals.get(name, 0) + int(value)
        row |= {f"{name}/s": value / seconds for name, value in counted.items() if name != "dropped"}
        row |= {"dropped": float(self.state.totals.get("dropped", 0)), "skipped": float(self.state.skipped)}
        row |= {"lr": window.rate, "loader_wait": window.wait / seconds, "seconds_a_step": seconds / window.steps}
        row |= {"hours": self.state.seconds / 3600}
        if self.device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9  # since the row before
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.flops_a_token and self.settings.peak_tflops:
            flops = 3 * self.flops_a_token * window.counts["tokens"]  # backward is twice the forward
            row["mfu"] = flops / seconds / (1e12 * self.settings.peak_tflops)
        self._write("train", row)
        speed = f"{row.get('tokens/s', 0):.0f} tokens/s, wait {row['loader_wait']:.0%}"
        return f"loss {row['total']:.4f}, {speed}, skipped {self.state.skipped}"

    def _validate(self) -> None:
        """Mean of each term over the validation batches, EMA weights; rank r scores every size-th batch."""
        sums: dict[str, float] = defaultdict(float)
        with torch.no_grad():
            score = _Loss(self.ema, self.function, self.settings.precision, self.device)
            for number in range(self.ranks.rank, len(self.validation), self.ranks.size):
                generator = torch.Generator(self.device).manual_seed(number)
                terms = score(self.validation[number].to(self.device, non_blocking=True), generator)
                for name, x in terms.items():
                    sums[name] += float(x)
        names = self.ranks.names(sums)
        values = self.ranks.sum([sums[name] for name in names])
        self._write("validation", {name: value / len(self.validation) for name, value in zip(names, values, strict=True)})
        if self.picture and self.ranks.rank == 0:
            path = self.out / "pictures" / f"step_{self.state.step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            with torch.no_grad():
                self.picture(self.ema, path)
            if path.exists():
                pixels = np.asarray(optional_import("PIL.Image").open(path).convert("RGB"))
                self.board.add_image("validation/picture", pixels, self.state.step, dataformats="HWC")
                self.board.flush()

    def _save(self) -> None:
        if self.ranks.rank == 0:
            folder = self.out / "checkpoints"
            save_checkpoint(folder, self.model, self.ema, self.optimizer, vars(self.state), self.card, self.settings.keep)


class _Window:
    """Sums since the last row of the log."""

    def __init__(self) -> None:
        self.begin, self.wait, self.rate = time.perf_counter(), 0.0, 0.0
        self.steps = self.finite = 0
        self.terms: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, values: Mapping[str, float]) -> None:
        self.finite += 1
        for name, value in values.items():
            self.terms[name] += value

    def count(self, batch: Batch, rate: float) -> None:
        self.steps += 1
        self.rate = rate
        for name, value in batch.counts.items():
            self.counts[name] += value
