"""Named figures with bounds, as `benchmarks.layer` and `benchmarks.worst_cases` give them: screen, CSV, Markdown."""

from __future__ import annotations

import csv
from pathlib import Path

from .timing import short_name

COLUMNS = "figure T value unit bound kept gpu torch triton commit date".split()


def default_path(environment: dict[str, str], name: str) -> Path:
    """benchmarks/results/GPU-DATE-name.csv."""
    return Path(__file__).parent / "results" / f"{short_name(environment['gpu'])}-{environment['date']}-{name}.csv"


class Figures:
    """Figures as they come: on the screen, as lines of a CSV file with `COLUMNS`, at the end as Markdown beside it."""

    def __init__(self, path: Path, environment: dict[str, str], bounded: bool):
        """A new file, or a file of the same name written anew; without `bounded` no bound is looked at."""
        self.path, self.environment, self.bounded = path, environment, bounded
        self.rows: list[dict[str, str]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writeheader()

    @property
    def good(self) -> bool:
        """Whether every bound is kept and nothing failed."""
        return all(row["kept"] in ("", "yes") for row in self.rows)

    def add(self, name: str, num_tokens: int, value: float, unit: str, bound: float | None = None) -> None:
        """A figure and the most it may be."""
        bound = bound if self.bounded else None
        kept = "" if bound is None else "yes" if value <= bound else "no"
        self._row(name, num_tokens, f"{value:.4g}", unit, "" if bound is None else f"{bound:.4g}", kept)

    def fail(self, name: str, num_tokens: int, reason: str) -> None:
        """A part that gave no figure, and why."""
        self._row(f"{name}: {reason}", num_tokens, "", "", "", "failed")

    def _row(self, name: str, num_tokens: int, value: str, unit: str, bound: str, kept: str) -> None:
        row = dict(figure=name, T=str(num_tokens), value=value, unit=unit, bound=bound, kept=kept) | self.environment
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        beside = {"": "", "yes": f"(bound {bound})", "no": f"(bound {bound}, EXCEEDED)", "failed": "FAILED"}[kept]
        print(f"{name:56} T={num_tokens:<9,} {value:>9} {unit:2} {beside}".rstrip(), flush=True)

    def write_markdown(self, title: str, command: str, conditions: str) -> None:
        env = self.environment
        lines = [
            f"# {title} on {env['gpu']}",
            "",
            f"`{command}`, data in `{self.path.name}`. torch {env['torch']}, Triton {env['triton']}, commit {env['commit']}, "
            f"{env['date']}. {conditions}",
            "",
            "| figure | T | value | bound |",
            "|---|---|---|---|",
        ]
        for row in self.rows:
            bound = {"": "–", "yes": f"≤ {row['bound']}", "no": f"**≤ {row['bound']}: exceeded**", "failed": "**failed**"}[row["kept"]]
            lines.append(f"| {row['figure']} | {int(row['T']):,} | {row['value']} {row['unit']} | {bound} |")
        self.path.with_suffix(".md").write_text("\n".join(lines) + "\n")
