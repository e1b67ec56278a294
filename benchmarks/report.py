"""Markdown and plots of a result file: `python -m benchmarks.report benchmarks/results/h200-DATE.csv`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from .cases import CHIPS, Chip, Pairs, binding, limit_seconds, ssa_work
from .rows import Row, read

# The four operators of the released Direct3D-S2 code, summed, and FlashAttention-2 beside them: (forward, backward) in ms, bf16, 32 query
# and 2 key/value heads (FA2: 32), the gyroid inputs of `cases.py`; one H200, torch 2.11, Triton 3.6, CUDA 13, 2026-11-22.
RELEASED_FA2 = {
    (8_192, 32): (1.34, 3.46),
    (16_384, 32): (5.02, 13.1),
    (32_768, 32): (19.6, 50.3),
    (65_536, 32): (77.2, 197.0),
    (131_072, 32): (306.0, 792.0),
    (262_144, 32): (1230.0, 3162.0),
    (131_072, 64): (455.0, 1190.0),
}
RELEASED = {
    (8_192, 32, "4/8/8"): (3.82, 4.31),
    (16_384, 32, "4/8/8"): (5.36, 6.82),
    (32_768, 32, "4/8/8"): (11.3, 12.9),
    (65_536, 32, "4/8/8"): (36.3, 40.4),
    (131_072, 32, "4/8/8"): (80.8, 90.5),
    (262_144, 32, "4/8/8"): (252.0, 253.0),
    (8_192, 32, "8/8/8"): (2.37, 3.99),
    (16_384, 32, "8/8/8"): (3.54, 5.27),
    (32_768, 32, "8/8/8"): (7.15, 8.84),
    (65_536, 32, "8/8/8"): (19.7, 22.7),
    (131_072, 32, "8/8/8"): (38.5, 44.5),
    (262_144, 32, "8/8/8"): (73.7, 120.0),
    (8_192, 32, "4/8/32"): (4.34, 5.68),
    (16_384, 32, "4/8/32"): (8.81, 11.9),
    (32_768, 32, "4/8/32"): (21.8, 27.9),
    (65_536, 32, "4/8/32"): (51.2, 65.1),
    (131_072, 32, "4/8/32"): (121.0, 155.0),
    (262_144, 32, "4/8/32"): (376.0, 508.0),
    (131_072, 64, "4/8/8"): (115.0, 127.0),
}
PEER_NAMES = {"fa2": "FlashAttention-2", "cudnn": "cuDNN", "flex": "flex_attention"}
BRANCH_NAMES = {"all": "whole operator", "cmp": "compression", "score": "score + top-k", "slc": "selection", "win": "window"}


def line(row: Row, rows: list[Row]) -> str:
    """One measured row for the screen; with the ratio to FlashAttention-2 at the same T and D where `rows` has it."""
    blocks = f"{_blocks(row)} {row['voxels']}" if row["m_cmp"] else "dense"
    text = f"{row['impl']:5} {row['pass']:4} T={int(row['T']):>9,} D={row['head_dim']} {blocks:20} {float(row['ms']):9.3f} ms"
    text += f" ({float(row['ms_p20']):.3f}-{float(row['ms_p80']):.3f})"
    text += f" {float(row['tflops']):6.4g} TFLOP/s" if row["tflops"] else ""
    text += f" {float(row['limit_share']):5.1%} of the limit" if row["limit_share"] else ""
    text += f" {float(row['peak_gb']):6.3f} GB" if row["peak_gb"] else ""
    fa2 = _fa2(row, rows)
    return text + (f" {fa2 / float(row['ms']):6.2f}x FA2" if fa2 and row["impl"] == "ssa" else "")


def write(path: Path) -> None:
    """Write the Markdown, and the plots where matplotlib is installed, beside a result file."""
    rows = read(path)
    growth_path = path.with_name(path.stem + "-branches.csv")
    growth = read(growth_path) if growth_path.exists() else []
    notes = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".md").write_text(markdown(rows, growth, notes, path.name))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"No plot: matplotlib is not installed here. Later: python -m benchmarks.report {path}")
        return
    if rows:
        plot_times(rows, path.with_suffix(".png"))
    if growth:
        plot_growth(growth, growth_path.with_suffix(".png"))


def markdown(rows: list[Row], growth: list[Row], notes: dict, name: str) -> str:
    """The report: environment, one table a (D, blocks), meshes, growth, failures."""
    env, peers = notes["environment"], notes["peers"]
    dates, commits = (sorted({row[column] for row in rows}) for column in ("date", "commit"))
    parts = [
        f"# ssa beside dense attention on {env['gpu']}",
        f"`python -m benchmarks.run`, data in `{name}`. torch {env['torch']}, Triton {env['triton']}, commit {', '.join(commits)}, "
        f"{', '.join(dates)}. ms are medians of 3 to 20 calls (CUDA events on a GPU), quantiles in the data. bf16 on a GPU. Dense peers "
        "have 32 key/value heads, ssa 32 query and 2 key/value heads. " + "; ".join(f"{k} = {what}" for k, what in peers.items()) + ".",
        "A cell is forward / backward. × FA2: time of FA2 over the time of ssa. Limit: share of the model in `cases.py` (exp, matrix or "
        "bytes at full rate, one exp pass). GB: extra peak memory of forward / forward + backward, without what the call returns. "
        "Released: the operators of the released Direct3D-S2 code, timed once on one H200 (2026-11-22, torch 2.11), and their ratio to "
        "the FA2 of that run.",
    ]
    own = [row for row in rows if row["impl"] == "ssa"]
    for voxels in sorted({row["voxels"] for row in own}, key=lambda v: (v != "gyroid", v)):
        for D in sorted({row["head_dim"] for row in own}, key=int):
            for blocks in sorted({_blocks(row) for row in own}):
                group = [r for r in own if (r["voxels"], r["head_dim"], _blocks(r)) == (voxels, D, blocks)]
                if group:
                    parts.append(f"## {voxels}, D = {D}, m_cmp/m_slc/topk = {blocks}")
                    parts.append(table(group, rows, notes["failures"], released=voxels == "gyroid"))
    if env["gpu"] in CHIPS and own:
        parts += ["## What the model of `cases.py` allows, ms and what binds", limits_table(own, CHIPS[env["gpu"]])]
    if growth:
        parts += ["## Growth", growth_table(growth)]
    if notes["failures"]:
        parts += ["## Without a time"]
        grouped: dict[tuple[str, str], list[str]] = {}
        for failure in notes["failures"]:
            grouped.setdefault((failure["case"], failure["reason"]), []).append(failure["pass"])
        parts += ["\n".join(f"- {case} ({', '.join(passes)}): {reason}" for (case, reason), passes in grouped.items())]
    return "\n\n".join(parts) + "\n"


def table(group: list[Row], rows: list[Row], failures: list[dict[str, str]], *, released: bool) -> str:
    """ssa at every T of one setting beside the dense peers and the released operators."""
    head = ["T", "C", "S", "ssa ms", "FA2 ms", "cuDNN ms", "flex ms", "× FA2"]
    head += (["released ms", "released × FA2"] if released else []) + ["TFLOP/s", "limit", "GB"]
    lines = []
    for T in sorted({int(row["T"]) for row in group}):
        of_size = [row for row in group if int(row["T"]) == T]
        passes, D, blocks = {row["pass"]: row for row in of_size}, of_size[0]["head_dim"], _blocks(of_size[0])
        dense = [_cell([_time(rows, impl, p, T, D) for p in ("fwd", "bwd")]) for impl in PEER_NAMES]
        failed = {failure["impl"] for failure in failures if (failure["T"], failure["head_dim"]) == (str(T), D)}
        dense = ["failed" if cell == "–" and impl in failed else cell for impl, cell in zip(PEER_NAMES, dense, strict=True)]
        ratios = [_ratio(_time(rows, "fa2", p, T, D), _number(passes.get(p), "ms")) for p in ("fwd", "bwd")]
        cells = [f"{T:,}", of_size[0]["C"], of_size[0]["S"], _cell([_number(passes.get(p), "ms") for p in ("fwd", "bwd")]), *dense]
        cells.append(_cell(ratios))
        if released:
            before, fa2 = RELEASED.get((T, int(D), blocks)), RELEASED_FA2.get((T, int(D)))
            cells += [_cell(before), _cell([a / b for a, b in zip(fa2, before, strict=True)]) if before and fa2 else "–"]
        cells.append(_cell([_number(passes.get(p), "tflops") for p in ("fwd", "bwd")]))
        cells.append(" / ".join("–" if x is None else f"{x:.0%}" for x in (_number(passes.get(p), "limit_share") for p in ("fwd", "bwd"))))
        cells.append(_cell([_number(passes.get(p), "peak_gb") for p in ("fwd", "both")]))
        lines.append(cells)
    return _table(head, lines)


def limits_table(own: list[Row], chip: Chip) -> str:
    """Per branch, the time of the resource that binds it, at the largest T of the gyroid up to 131,072; the score as a second exp pass."""
    rows = [row for row in own if row["voxels"] == "gyroid" and int(row["T"]) <= 131_072 and row["pass"] != "both"]
    largest = [row for row in rows if int(row["T"]) == max(int(r["T"]) for r in rows)]
    lines = []
    for row in largest:
        pairs = Pairs(*(int(row[f"pairs_{branch}"]) for branch in ("cmp", "slc", "win")))
        sizes = dict(num_tokens=int(row["T"]), head_dim=int(row["head_dim"]), topk=int(row["topk"]))
        work = ssa_work(row["pass"], pairs, **sizes, exp_passes=2)
        cells = {name: f"{max(w.seconds(chip).values()) * 1e3:.2f} {binding(w, chip)}" for name, w in work.items()}
        total = limit_seconds(work, chip) * 1e3
        one_pass = total - (max(work["score"].seconds(chip).values()) * 1e3 if "score" in work else 0)
        lines.append([f"{int(row['T']):,}", row["head_dim"], _blocks(row), row["pass"]])
        lines[-1] += [cells.get(name, "–") for name in ("cmp", "score", "slc", "win", "gates")]
        lines[-1] += [f"{one_pass:.1f}", f"{total:.1f}", _cell([_number(row, "ms")])]
    head = ["T", "D", "m_cmp/m_slc/topk", "pass", "compression", "score", "selection", "window", "gates", "sum, one exp pass", "sum", "ms"]
    return _table(head, lines)


def growth_table(growth: list[Row]) -> str:
    """Time of each branch at every T, and the exponent b of ms = a T^b fitted to the measured times and to the model's."""
    sizes = sorted({int(row["T"]) for row in growth})
    lines = []
    for (impl, pass_), series in _series(growth).items():
        measured = {int(row["T"]): float(row["ms"]) for row in series}
        model = {int(row["T"]): float(row["ms"]) * float(row["limit_share"]) for row in series if row["limit_share"]}
        fits = ["–" if len(times) < 2 else f"{exponent(times):.2f}" for times in (measured, model)]
        lines.append([BRANCH_NAMES[impl], pass_, *(_cell([measured.get(T)]) for T in sizes), *fits])
    return _table(["branch", "pass", *(f"{T:,}" for T in sizes), "exponent", "model's"], lines)


def exponent(times: dict[int, float]) -> float:
    """Least-squares b of log time = log a + b log T."""
    x, y = [math.log(T) for T in times], [math.log(t) for t in times.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def plot_times(rows: list[Row], path: Path) -> None:
    """Time against T, log-log, D = 32: forward and backward of every implementation over the gyroid."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for axis, pass_, title in zip(axes, ("fwd", "bwd"), ("forward", "backward"), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["pass"] == pass_ and row["head_dim"] == "32" and row["voxels"] in ("", "gyroid"):
                label = f"ssa {_blocks(row)}" if row["impl"] == "ssa" else PEER_NAMES[row["impl"]]
                lines.setdefault(label, {})[int(row["T"])] = float(row["ms"])
        for label, times in sorted(lines.items()):
            style = "o-" if label.startswith("ssa") else "s--"
            axis.loglog(*zip(*sorted(times.items()), strict=True), style, label=label, markersize=4)
        times = {T: ms[pass_ == "bwd"] for (T, D, blocks), ms in RELEASED.items() if (D, blocks) == (32, "4/8/8")}
        axis.loglog(*zip(*sorted(times.items()), strict=True), ":", color="gray", label="released operators 4/8/8 (H200)")
        axis.set(title=title, xlabel="voxels T")
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['gpu']}, bf16, 32 heads of 32")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_growth(growth: list[Row], path: Path) -> None:
    """Time of each branch against T, log-log, with the fitted exponents; dashed: the model of `cases.py`."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    colors = dict(zip(BRANCH_NAMES, ("black", "C0", "C1", "C2", "C3"), strict=True))
    for (impl, pass_), series in _series(growth).items():
        axis = axes[int(pass_ == "bwd")]
        measured = {int(row["T"]): float(row["ms"]) for row in series}
        fit = f", T^{exponent(measured):.2f}" if len(measured) > 1 else ""
        axis.loglog(list(measured), list(measured.values()), "o-", color=colors[impl], label=BRANCH_NAMES[impl] + fit, markersize=4)
        model = {int(row["T"]): float(row["ms"]) * float(row["limit_share"]) for row in series if row["limit_share"]}
        axis.loglog(list(model), list(model.values()), "--", color=colors[impl], alpha=0.5)
    for axis, title in zip(axes, ("forward", "backward"), strict=True):
        axis.set(title=title, xlabel="voxels T")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("ms (dashed: model at full rates)")
    figure.suptitle(f"{growth[0]['gpu']}, D = {growth[0]['head_dim']}, {_blocks(growth[0])}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _series(growth: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(branch, pass) → rows by T."""
    keys = [(impl, pass_) for pass_ in ("fwd", "bwd") for impl in BRANCH_NAMES]
    series = {k: sorted((r for r in growth if (r["impl"], r["pass"]) == k), key=lambda r: int(r["T"])) for k in keys}
    return {k: rows for k, rows in series.items() if rows}


def _blocks(row: Row) -> str:
    return f"{row['m_cmp']}/{row['m_slc']}/{row['topk']}"


def _time(rows: list[Row], impl: str, pass_: str, T: int | str, D: str) -> float | None:
    """ms of a dense peer."""
    return next((float(r["ms"]) for r in rows if (r["impl"], r["pass"], r["T"], r["head_dim"]) == (impl, pass_, str(T), D)), None)


def _fa2(row: Row, rows: list[Row]) -> float | None:
    return _time(rows, "fa2", row["pass"], row["T"], row["head_dim"])


def _number(row: Row | None, column: str) -> float | None:
    return float(row[column]) if row and row[column] else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _cell(values) -> str:
    """Numbers with three significant digits and no exponent, joined by " / "; "–" for what is missing."""
    if values is None or all(x is None for x in values):
        return "–"
    return " / ".join("–" if x is None else f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))) if x else 0)}f}" for x in values)


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, the first column to the left."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("csv", type=Path)
    write(parser.parse_args(arguments).csv)


if __name__ == "__main__":
    main()
