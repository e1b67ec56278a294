"""Rows of a result file: one CSV line a (case, pass), flushed as measured, and a JSON file beside it with what a CSV cannot say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .cases import DENSE, Case

COLUMNS = (
    "impl pass T head_dim num_heads num_kv_heads m_cmp m_slc topk voxels resolution C S pairs_cmp pairs_slc pairs_win "
    "ms ms_p20 ms_p80 tflops limit_share peak_gb gpu torch triton commit date"
).split()
MACHINE = ("gpu", "torch", "triton")

Row = dict[str, str]


def case_columns(case: Case) -> dict[str, object]:
    """The columns that name a case; those a dense peer has not are empty."""
    m_cmp, m_slc, topk = case.blocks or ("", "", "")
    return {
        "impl": case.impl,
        "T": case.num_tokens,
        "head_dim": case.head_dim,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "m_cmp": m_cmp,
        "m_slc": m_slc,
        "topk": topk,
        "voxels": case.voxels or "",
        "resolution": case.resolution or "",
    }


def key(row: dict[str, object] | Row) -> tuple[str, ...]:
    """What makes a row the row of its (case, pass)."""
    return tuple(str(row[name]) for name in COLUMNS[:11])


class ResultFile:
    """`path` (CSV with `COLUMNS`) and `path` with .json: environment, peers, failures."""

    def __init__(self, path: Path, environment: dict[str, str], peers: dict[str, str], *, resume: bool = False):
        """Start afresh, or with resume=True keep what is there.

        Kept rows must come from the same gpu, torch and triton (else ValueError). Rows of our own code from another commit are dropped,
        to be measured again.
        """
        self.path, self.environment, self.peers = path, environment, peers
        self.rows: list[Row] = []
        self.failures: list[dict[str, str]] = []
        if path.exists() and not resume:
            raise ValueError(f"{path} exists: --resume adds to it, --out names another")
        if path.exists():
            self.rows = [row for row in read(path) if row["impl"] in DENSE or row["commit"] == environment["commit"]]
            self.failures = json.loads(path.with_suffix(".json").read_text())["failures"]
            for row in self.rows:
                if any(row[name] != environment[name] for name in MACHINE):
                    raise ValueError(f"--resume needs the machine of {path.name}: {[row[name] for name in MACHINE]}, got {environment}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        self._write_notes()

    def __contains__(self, case_and_pass: tuple[Case, str]) -> bool:
        case, pass_ = case_and_pass
        return key(case_columns(case) | {"pass": pass_}) in {key(row) for row in self.rows}

    def add(self, case: Case, pass_: str, columns: dict[str, object]) -> Row:
        """Append the row of a (case, pass) to the file."""
        values = case_columns(case) | columns | {"pass": pass_}
        row = {name: _text(values.get(name)) for name in COLUMNS} | self.environment
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        self.forget(case, pass_)
        return row

    def fail(self, case: Case, pass_: str, reason: str) -> None:
        """Record that a (case, pass) gave no time, and why."""
        self.forget(case, pass_)
        named = {"impl": case.impl, "T": str(case.num_tokens), "head_dim": str(case.head_dim)}
        self.failures.append({"case": str(case), "pass": pass_, "reason": reason} | named)
        self._write_notes()

    def forget(self, case: Case, pass_: str) -> None:
        """Drop the failure of an earlier call, if there was one."""
        kept = [failure for failure in self.failures if (failure["case"], failure["pass"]) != (str(case), pass_)]
        if len(kept) < len(self.failures):
            self.failures = kept
            self._write_notes()

    def _write_notes(self) -> None:
        notes = {"environment": self.environment, "peers": self.peers, "failures": self.failures}
        self.path.with_suffix(".json").write_text(json.dumps(notes, indent=2) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a result file. ValueError if its columns are others."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} must have the columns {COLUMNS}, got {reader.fieldnames}")
        return list(reader)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
