"""The curve of a run of `reference_model.train_vae`: `python -m examples.plot_training RUN/log.jsonl [NEXT/log.jsonl …] --out curve.png`.

Several logs are runs one after another, each from the weights of the one before; `--beside LOG` is another run from the first step, dashed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TERMS = {"in": "tab:blue", "ext": "tab:orange", "sharp": "tab:green", "total": "tab:gray"}


def read_runs(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of all logs with steps counted on, and the step each run begins behind."""
    rows: list[dict[str, Any]] = []
    starts: list[int] = []
    for path in paths:
        starts.append(rows[-1]["step"] if rows else 0)
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.endswith("}"):  # a run that was killed while it wrote
                continue
            row = json.loads(line)
            rows.append(row | {"step": row["step"] + starts[-1]})
    return rows, starts


def draw(paths: Sequence[Path], out: Path, beside: Path | None = None) -> None:
    """Losses over steps, both logarithmic: lines of the batches as logged, circles of the held-out meshes (EMA), before the first step too;
    crosses of `beside`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, starts = read_runs(paths)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))

    def curves(rows: Sequence[dict[str, Any]], line: str, mark: str, labels: bool) -> None:
        for name, color in TERMS.items():
            for kind, style in (("train", {"lw": 1, "ls": line}), ("validation", {"marker": mark, "lw": 0})):
                chosen = [row for row in rows if row["kind"] == kind and name in row]
                label = name if labels and kind == "train" else None
                steps, values = [max(row["step"], 1) for row in chosen], [row[name] for row in chosen]
                axes.plot(steps, values, color=color, label=label, **style)  # type: ignore[arg-type]

    curves(rows, "-", "o", True)
    if beside is not None:
        curves(read_runs([beside])[0], "--", "x", False)
    for start in starts[1:]:
        axes.axvline(start, color="black", lw=0.5, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="mean error as minimised, in units of the band")
    axes.set_title("lines: batches; circles: held out" + ("" if beside is None else f"; dashed and crosses: {beside.stem}"))
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(out, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curve.png"))
    args = parser.parse_args()
    draw(args.logs, args.out, args.beside)


if __name__ == "__main__":
    main()
