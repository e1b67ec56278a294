"""Settings of `reference_model.trainer.Trainer`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """What `Trainer` needs to know; all of it shapes the curve but `minutes`, the `…_every`, `keep`, `max_skipped` and `peak_tflops`."""

    steps: int
    lr: float = 1e-4
    optimizer: str = "adamw"  # or muon, for weights that are matrices: see `reference_model.optimizers`
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"  # cosine (to 0) or constant, after the warm-up
    warmup: int = 0  # steps of linear rise
    schedule_minutes: float | None = None  # the cosine and the run end after so much training, over all calls: no two runs are alike
    clip: float = 1.0  # norm of all gradients together
    ema: float = 0.9999  # reached from below: (1 + step) / (10 + step) at first
    precision: str = "bf16"  # bf16 (autocast) or fp32
    seed: int = 0
    minutes: float | None = None  # stop and save after so much of this call
    log_every: int = 10
    validate_every: int = 1000
    save_every: int = 1000
    keep: int = 2  # checkpoints
    max_skipped: int = 10  # non-finite steps in a row that end the run
    peak_tflops: float | None = None  # of one device, for the model FLOP utilisation

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant") or self.precision not in ("bf16", "fp32"):
            raise ValueError(f"schedule is cosine or constant, precision bf16 or fp32, got {self.schedule=}, {self.precision=}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is adamw or muon, got {self.optimizer=}")
        if min(self.steps, self.log_every, self.validate_every, self.save_every, self.keep) < 1:
            raise ValueError(f"steps, log_every, validate_every, save_every and keep must be positive, got {self}")

    def is_over(self, seconds: float, of_this_call: float) -> bool:
        """After so many seconds of training, of all calls and of this one."""
        limits = ((seconds, self.schedule_minutes), (of_this_call, self.minutes))
        return any(minutes is not None and done >= 60 * minutes for done, minutes in limits)

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of step (0 is the first) after so many seconds of training."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "constant":
            return self.lr * rise
        done = seconds / (60 * self.schedule_minutes) if self.schedule_minutes else step / self.steps
        return self.lr * rise * (1 + math.cos(math.pi * min(done, 1.0))) / 2
