"""Training checkpoints: one safetensors file with the whole state, its header says what made it.

Tensors: `model/NAME`, `ema/NAME`, `optimizer/PART/INDEX/KEY`. Header: `format`, `state` (JSON: step and counters; all random numbers
and the loader's place follow from seed and step), `card` (JSON: configuration, commit, sha256 of the data).
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reference_model.optimizers import Optimizers

_FORMAT = "ssa-checkpoint-2"


def save_checkpoint(
    folder: Path, model: nn.Module, ema: nn.Module, optimizer: Optimizers, state: Mapping[str, Any], card: Mapping[str, Any], keep: int = 2
) -> Path:  # fmt: skip
    """Write folder/step_NNNNNNNN.safetensors (state["step"]), whole or not at all, and remove all but the newest `keep`."""
    from safetensors.torch import save_file

    tensors = {f"model/{name}": x for name, x in model.state_dict().items()} | {f"ema/{name}": x for name, x in ema.state_dict().items()}
    tensors |= {f"optimizer/{name}": x for name, x in optimizer.state().items()}
    header = {"format": _FORMAT, "state": json.dumps(dict(state)), "card": json.dumps(dict(card))}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.safetensors"
    part = folder / f".{path.name}.part"
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, part, header)
    os.replace(part, path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest step first."""
    return sorted(folder.glob("step_*.safetensors"))


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, card) of a checkpoint; ValueError for another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a checkpoint: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a checkpoint of format {_FORMAT}: {header.get('format')=}")
    return json.loads(header["state"]), json.loads(header["card"])


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """Fill model, EMA and optimiser from a checkpoint; its state is returned. RuntimeError where names or shapes differ."""
    from safetensors.torch import load_file

    state, _ = read_header(path)
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, x in load_file(path).items():
        kind, _, rest = name.partition("/")
        groups[kind][rest] = x
    model.load_state_dict(groups["model"])
    ema.load_state_dict(groups["ema"])
    optimizer.load_state(groups["optimizer"])
    return state


def git_commit() -> str:
    """Commit of this code, with "-dirty" where files differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")
