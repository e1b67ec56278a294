"""Search launch settings of one kernel on this GPU: `python -m benchmarks.tune slc.dq --head-dim 64`.

One number at a time takes the next value below or above (`TILES`, `VALUES`), from the setting in `_config` on, and is kept where the branch
got faster by over 1 %, until nothing helps. A setting that fails or changes the result beyond rounding is shown and never kept. What comes
out is copied into `_config` by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from .branches import branch_calls
from .cases import make_inputs
from .timing import Call, environment, measure, reason_of, synchronize
from .voxels import gyroid

Setting = dict[str, int]
GAIN = 0.99
TILES = (16, 32, 64, 128, 256)
VALUES = {  # of every number that is no tile size
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
    "maxnreg": (64, 80, 96, 128, 168, 208, 255),
    "HEADS": (1, 2, 4, 8),
    "SHARE": (0, 4, 8),
    "ENTRIES": (0, 32, 64, 128, 256, 512),
}
KERNELS = {  # name → (module of ssa.kernels, name the module gives to `_config` or None, branch, pass)
    "cmp.fwd": ("varlen_attention", "fwd", "cmp", "fwd"),
    "cmp.dq": ("varlen_attention", "dq", "cmp", "bwd"),
    "cmp.dkv": ("varlen_attention", "dkv", "cmp", "bwd"),
    "score": ("block_topk", None, "score", "fwd"),
    "slc.fwd": ("selected_attention", "fwd", "slc", "fwd"),
    "slc.dq": ("selected_attention", "dq", "slc", "bwd"),
    "slc.fwd.query": ("selected_attention_by_query", "fwd", "slc", "fwd"),  # of small blocks, as at T = 4,096
    "slc.dq.query": ("selected_attention_by_query", "dq", "slc", "bwd"),
    "slc.dkv": ("selected_attention", "dkv", "slc", "bwd"),
    "win.fwd": ("varlen_attention", "fwd", "win", "fwd"),
    "win.dq": ("varlen_attention", "dq", "win", "bwd"),
    "win.dkv": ("varlen_attention", "dkv", "win", "bwd"),
}


def neighbours(setting: Setting) -> Iterator[Setting]:
    """Every setting one step away: one number at its next value below or above."""
    for name, value in setting.items():
        values = TILES if name.startswith("BLOCK_") else VALUES[name]
        for other in [*[x for x in values if x < value][-1:], *[x for x in values if x > value][:1]]:
            yield setting | {name: other}


def override(module: ModuleType, kernel: str | None, setting: Setting) -> AbstractContextManager:
    """While active, `module._config` answers `setting` for `kernel` (None: for every question)."""
    original = module._config

    def config(*arguments, **options) -> Setting:
        asked = arguments[0] if arguments else options.get("kernel")
        return dict(setting) if kernel in (None, asked) else original(*arguments, **options)

    return mock.patch.object(module, "_config", config)


def current(module: ModuleType, kernel: str | None, call: Call) -> Setting:
    """What `_config` answers for `kernel` while `call` runs."""
    answers: list[Setting] = []
    original: Callable[..., Setting] = module._config

    def config(*arguments, **options) -> Setting:
        answer = original(*arguments, **options)
        if kernel in (None, arguments[0] if arguments else options.get("kernel")):
            answers.append(dict(answer))
        return answer

    with mock.patch.object(module, "_config", config):
        call()
    if not answers:
        raise ValueError(f"the call must ask {module.__name__}._config for the kernel: {kernel=}")
    return answers[0]


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Floats within 2 % of the largest, integers (a choice of blocks, near ties apart) equal in 99.9 %."""
    for a, b in zip(got, expected, strict=True):
        if not a.is_floating_point():
            if (a != b).double().mean() > 1e-3:
                return False
        elif not (a - b).abs().max() <= 0.02 * b.abs().max():
            return False
    return True


def search(
    start: Setting, evaluate: Callable[[Setting], float | None], show: Callable[[Setting, float | None], None]
) -> tuple[Setting, float]:
    """Walk downhill from `start`; `evaluate` gives ms, or None for a setting that cannot be used."""
    first = evaluate(start)
    show(start, first)
    if first is None:
        raise RuntimeError(f"the setting in _config must run: {start}")
    best, best_ms = start, first
    tried = {tuple(start.items())}
    moved = True
    while moved:
        moved = False
        for setting in neighbours(best):
            if tuple(setting.items()) in tried:
                continue
            tried.add(tuple(setting.items()))
            ms = evaluate(setting)
            show(setting, ms)
            if ms is not None and ms < GAIN * best_ms:
                best, best_ms, moved = setting, ms, True
                break
    return best, best_ms


def main(arguments: list[str] | None = None) -> int:
    import importlib

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--T", type=int, default=131_072)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--cases", type=lambda text: tuple(map(int, text.split("/"))), default=(4, 8, 8), metavar="M_CMP/M_SLC/TOPK")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of repetitions a setting")
    parser.add_argument("--commit", help="name of the code version where git is not at hand")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU")
    device = torch.device("cuda")
    print(" ".join(f"{name}={value!r}" for name, value in environment(device, options.commit).items()))
    inputs = make_inputs(gyroid(options.T), options.head_dim, options.cases, device=device, dtype=options.dtype)
    topk_indices = inputs.choose()
    for name in options.kernels:
        module_name, kernel, branch, pass_ = KERNELS[name]
        module = importlib.import_module(f"ssa.kernels.{module_name}")
        call = branch_calls(branch, inputs, topk_indices)[pass_]
        expected = _tuple(call())

        def evaluate(setting: Setting, module=module, kernel=kernel, call=call, expected=expected) -> float | None:
            try:
                with override(module, kernel, setting):
                    if not same(_tuple(call()), expected):
                        return None
                    return measure(call, device, options.budget).ms
            except Exception as error:
                print(f"    {reason_of(error)[:120]}")
                synchronize(device)
                return None

        def show(setting: Setting, ms: float | None, name=name) -> None:
            print(f"  {name} {setting} {'unusable' if ms is None else f'{ms:.3f} ms'}", flush=True)

        best, ms = search(current(module, kernel, call), evaluate, show)
        print(f"{name} D={options.head_dim} {options.dtype} T={options.T:,}: {best} {ms:.3f} ms ({pass_} of the branch)", flush=True)
    return 0


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in ((result,) if isinstance(result, Tensor) else result))


if __name__ == "__main__":
    sys.exit(main())
