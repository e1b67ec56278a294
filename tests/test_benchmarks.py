"""The benchmarks measure what they say: inputs, formulas, gate, result files, report, search."""

import csv
import importlib
import inspect
import json
from dataclasses import replace

import pytest
import torch
import trimesh

import ssa
from benchmarks import branches, cases, figures, gate, layer, peers, report, rows, run, timing, tune, voxels, worst_cases

CPU = torch.device("cpu")
H200 = cases.CHIPS["NVIDIA H200"]
ENVIRONMENT = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "commit": "aaaa", "date": "2026-01-01"}


def small_inputs(num_tokens: int = 400, seed: int = 0) -> cases.Inputs:
    coords = voxels.gyroid(num_tokens, 20)
    return cases.make_inputs(coords, 16, (4, 8, 4), device=CPU, dtype=torch.float32, num_heads=4, seed=seed)


# voxels


def test_gyroid_has_the_known_counts():
    coords = voxels.gyroid(131_072)
    assert coords.shape == (131_072, 4) and coords.dtype == torch.int32 and not coords[:, 0].any()
    partition = ssa.partition_voxels(coords)
    assert (len(partition.compression), len(partition.selection)) == (7_488, 1_836)
    assert [voxels.gyroid_resolution(T) for T in (32_768, 32_769, 262_144, 262_145)] == [64, 128, 128, 256]


def test_gyroid_takes_the_nearest_cells_of_the_ball():
    coords = voxels.gyroid(500, 16)
    u = (2 * torch.arange(16.0) + 1) / 16 - 1
    x, y, z = torch.meshgrid(u, u, u, indexing="ij")
    s, c = (lambda t: torch.sin(9 * t)), (lambda t: torch.cos(9 * t))
    distance = (s(x) * c(y) + s(y) * c(z) + s(z) * c(x)).abs()
    ball = x * x + y * y + z * z < 0.95
    taken = torch.zeros_like(ball)
    taken[tuple(coords[:, 1:].long().T)] = True
    assert int(taken.sum()) == 500 and not (taken & ~ball).any()
    assert distance[taken].max() <= distance[ball & ~taken].min() + 1e-6
    with pytest.raises(ValueError, match="num_tokens=5000"):
        voxels.gyroid(5000, 16)


def test_surface_voxels_of_a_cube_are_its_shell():
    coords = voxels.surface_voxels(trimesh.creation.box((3.0, 3.0, 3.0)), 16)
    assert coords.shape[0] == 16**3 - 14**3
    assert ((coords[:, 1:] == 0) | (coords[:, 1:] == 15)).any(1).all()


def test_default_mesh_is_two_closed_rings():
    mesh = voxels.linked_rings()
    assert mesh.is_watertight and len(mesh.split()) == 2
    assert voxels.surface_voxels(mesh, 64).unique(dim=0).shape[0] > 5_000


def test_load_mesh_refuses_a_file_without_faces(tmp_path):
    trimesh.PointCloud([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).export(tmp_path / "points.ply")
    with pytest.raises(ValueError, match="must have faces"):
        voxels.load_mesh(tmp_path / "points.ply")


def test_adverse_voxel_sets():
    dense = ssa.partition_voxels(voxels.solid_box(16, 8, 8))
    assert dense.selection.offsets.diff().tolist() == [512, 512]
    lone = ssa.partition_voxels(voxels.scattered(100, 8))
    assert len(lone.compression) == len(lone.selection) == lone.num_tokens == 100
    batch = ssa.partition_voxels(voxels.stack_samples([voxels.gyroid(300, 16), *[voxels.gyroid(3, 16)] * 5]))
    assert batch.cu_seqlens.diff().tolist() == [300, 3, 3, 3, 3, 3]


# cases


def test_pairs_count_every_query_and_key():
    coords = voxels.stack_samples([voxels.gyroid(120, 16), voxels.gyroid(40, 16)])
    inputs = cases.make_inputs(coords, 16, (4, 8, 3), device=CPU, dtype=torch.float32, num_heads=4)
    partition, chosen = inputs.partition, inputs.choose()
    sample, block = partition.coords[:, 0], torch.div(partition.coords, torch.tensor([1, 8, 8, 8]), rounding_mode="floor")
    same_window = (block[:, None] == block[None]).all(2).sum()
    token_block = torch.repeat_interleave(torch.arange(len(partition.selection)), partition.selection.offsets.diff())
    selected = (chosen[:, :, :, None] == token_block).sum()
    compressed = (sample[:, None] == partition.compression.coords[:, 0]).sum()
    assert cases.count_pairs(partition, chosen, 4) == cases.Pairs(4 * int(compressed), 2 * int(selected), 4 * int(same_window))


def test_useful_flops_count_two_products_forward_and_five_backward():
    assert [cases.useful_flops(p, 32, 10) for p in ("fwd", "bwd", "both")] == [2 * 2 * 320, 5 * 2 * 320, 7 * 2 * 320]


@pytest.mark.parametrize(
    ("head_dim", "blocks", "C", "pairs_slc", "fwd_two_exp", "bwd"),
    # the sums of the units' times at T = 131,072 on an H200, by hand, in ms
    [(32, (4, 8, 8), 7488, 4.6e9, 18.6, 16.3), (32, (8, 8, 8), 1836, 2.4e9, 6.0, 6.6), (64, (4, 8, 8), 7488, 4.6e9, 22.4, 32.6)],
)
def test_limits_at_131k(head_dim, blocks, C, pairs_slc, fwd_two_exp, bwd):
    T = 131_072
    pairs = cases.Pairs(T * 32 * C, int(pairs_slc), T * 32 * 71)
    options = dict(num_tokens=T, head_dim=head_dim, topk=blocks[2])
    forward = cases.ssa_work("fwd", pairs, **options)
    assert forward["cmp"].seconds(H200)["exp"] == pytest.approx(T * 32 * C / 3.76e12)
    assert forward["cmp"].seconds(H200)["matrix"] == pytest.approx(4 * head_dim * T * 32 * C / 785e12)
    assert cases.binding(forward["cmp"], H200) == ("exp" if head_dim == 32 else "matrix")
    two = cases.ssa_work("fwd", pairs, **options, exp_passes=2)
    assert cases.limit_seconds(two, H200) * 1e3 == pytest.approx(fwd_two_exp, rel=0.01)
    score = max(two["score"].seconds(H200).values())
    assert cases.limit_seconds(two, H200) - cases.limit_seconds(forward, H200) == pytest.approx(score)
    assert cases.limit_seconds(cases.ssa_work("bwd", pairs, **options), H200) * 1e3 == pytest.approx(bwd, rel=0.01)


def test_selection_moves_the_least_of_its_two_schedules():
    few, many = (cases.ssa_work("fwd", cases.Pairs(0, pairs, 0), num_tokens=1000, head_dim=32, topk=8)["slc"] for pairs in (10**5, 10**9))
    row = 1000 * 32 * 32 * 2
    assert few.seconds(H200)["bytes"] == pytest.approx((2 * row + 2 * 1000 * 2 * 32 * 2 + 1000 * 32 * 4) / 4.25e12)
    assert many.seconds(H200)["bytes"] == pytest.approx(3 * 8 * row / 4.25e12)


def test_the_plan_is_the_published_one(monkeypatch):
    monkeypatch.setattr(cases, "MESH_RESOLUTIONS", (32, 64))  # the published ones, 128 and 256, take seconds
    plan = cases.gyroid_cases()
    assert {c.num_tokens for c in plan if c.impl == "ssa"} == {2**n for n in (12, 13, 14, 15, 16, 17, 18, 20)}
    assert {c.num_tokens for c in plan if c.impl == "fa2"} == {2**n for n in range(12, 19)}
    assert len(plan) == len(set(plan)) == 8 * 2 * 3 + 7 * 2 * 3
    meshes = [c for c in cases.mesh_cases() if c.impl == "ssa"]
    assert {c.voxels for c in meshes} == {"linked-rings"} and len({c.num_tokens for c in meshes}) == 2


# gate


def test_gate_passes_the_operator():
    inputs = small_inputs()
    gate.check_forward(inputs, inputs.choose())
    gate.check_backward(inputs, inputs.choose())
    gate.check_gradients.__wrapped__(16, (4, 8, 4), CPU, torch.float32)


@pytest.mark.parametrize("branch", range(3))
def test_gate_rejects_a_wrong_branch(monkeypatch, branch):
    right = ssa.spatial_sparse_attention

    def wrong(q, k, v, k_cmp, v_cmp, gates, *rest, **options):
        return right(q, k, v, k_cmp, v_cmp, gates * (1 + 0.01 * (torch.arange(3) == branch)), *rest, **options)

    inputs = small_inputs()
    topk_indices = inputs.choose()
    monkeypatch.setattr(ssa, "spatial_sparse_attention", wrong)
    with pytest.raises(gate.GateError, match="o must be within"):
        gate.check_forward(inputs, topk_indices)


def test_gate_rejects_a_wrong_choice():
    inputs = small_inputs()
    topk_indices = inputs.choose()
    rows_ = torch.arange(40)
    gate.check_choice(inputs, rows_, topk_indices)
    worst = gate.block_scores(inputs, rows_).argmin(2)
    with pytest.raises(gate.GateError, match="below one left out"):
        gate.check_choice(inputs, rows_, topk_indices.index_copy(0, rows_, _with_block(topk_indices[rows_], worst)))
    for broken in (topk_indices.flip(2), topk_indices.masked_fill(topk_indices == topk_indices.amax(2, keepdim=True), -1)):
        with pytest.raises(gate.GateError, match="ascending"):
            gate.check_choice(inputs, rows_, broken)


def _with_block(topk_indices: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The best-placed entry of each row replaced by `block`, ascending again."""
    return torch.cat([topk_indices[..., 1:], block[..., None].int()], 2).sort(2).values


def test_gate_rejects_a_wrong_gradient(monkeypatch):
    right = ssa.spatial_sparse_attention

    def wrong(q, k, *rest, impl=None, **options):
        k = k if impl == "naive" else k + 0.01 * (k - k.detach())
        return right(q, k, *rest, impl=impl, **options)

    monkeypatch.setattr(ssa, "spatial_sparse_attention", wrong)
    with pytest.raises(gate.GateError, match="dk must be within"):
        gate.check_gradients.__wrapped__(16, (4, 8, 4), CPU, torch.float32)


@pytest.mark.parametrize(("place", "name"), [(0, "dq"), (3, "dk_cmp"), (4, "dv_cmp"), (5, "dgates")])
def test_gate_rejects_a_wrong_gradient_at_the_timed_size(monkeypatch, place, name):
    right = ssa.spatial_sparse_attention

    def wrong(*inputs, **options):
        return right(*(x + 0.01 * (x - x.detach()) if i == place else x for i, x in enumerate(inputs)), **options)

    inputs = small_inputs()
    topk_indices = inputs.choose()
    monkeypatch.setattr(ssa, "spatial_sparse_attention", wrong)
    with pytest.raises(gate.GateError, match=f"{name} must be within"):
        gate.check_backward(inputs, topk_indices)


def test_gate_sums_the_gradients_of_blocks_in_pieces(monkeypatch):
    inputs = small_inputs()
    blocks = torch.arange(5)
    whole = gate.block_gradients(inputs, blocks, torch.float64)
    monkeypatch.setattr(gate, "KEY_CHUNK", 7)
    for a, b in zip(gate.block_gradients(inputs, blocks, torch.float64), whole, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_gate_checks_the_voxels():
    case = cases.Case("ssa", 131_072, 32, (4, 8, 8), "gyroid", 128)
    partition = ssa.partition_voxels(voxels.gyroid(131_072))
    gate.check_counts(case, partition)
    with pytest.raises(gate.GateError, match="7488"):
        gate.check_counts(case, ssa.partition_voxels(voxels.gyroid(120_000)))


def test_gate_checks_dense_peers():
    q, k, v = (torch.randn(2, 50, 16) for _ in range(3))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    gate.check_dense([q, k, v], o)
    with pytest.raises(gate.GateError, match="o must be within"):
        gate.check_dense([q, k, v], 1.001 * o)


# result files


def result_file(path, resume=False, **changes) -> rows.ResultFile:
    return rows.ResultFile(path, ENVIRONMENT | changes, {"fa2": "a peer"}, resume=resume)


OWN = cases.Case("ssa", 4096, 32, (4, 8, 8), "gyroid", 64)
PEER = cases.Case("fa2", 4096, 32, num_kv_heads=32)


def test_rows_are_on_disk_at_once_in_the_published_columns(tmp_path):
    results = result_file(tmp_path / "a.csv")
    results.add(OWN, "fwd", {"ms": 1.5, "C": 7})
    with (tmp_path / "a.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert list(row) == (
        "impl,pass,T,head_dim,num_heads,num_kv_heads,m_cmp,m_slc,topk,voxels,resolution,C,S,pairs_cmp,pairs_slc,pairs_win,"
        "ms,ms_p20,ms_p80,tflops,limit_share,peak_gb,gpu,torch,triton,commit,date"
    ).split(",")
    assert (row["impl"], row["pass"], row["m_slc"], row["C"], row["ms"], row["gpu"]) == ("ssa", "fwd", "8", "7", "1.5", "NVIDIA H200")
    assert (OWN, "fwd") in results and (OWN, "bwd") not in results and (replace(OWN, head_dim=64), "fwd") not in results


def test_resume_keeps_what_still_holds(tmp_path):
    path = tmp_path / "a.csv"
    results = result_file(path)
    for case in (OWN, PEER):
        results.add(case, "fwd", {"ms": 1.0})
    results.fail(PEER, "bwd", "out of memory")
    with pytest.raises(ValueError, match="--resume"):
        result_file(path)
    again = result_file(path, resume=True)
    assert (OWN, "fwd") in again and (PEER, "fwd") in again and again.failures == results.failures
    newer = result_file(path, resume=True, commit="bbbb")
    assert (OWN, "fwd") not in newer and (PEER, "fwd") in newer
    newer.add(PEER, "bwd", {"ms": 2.0})
    assert json.loads(path.with_suffix(".json").read_text())["failures"] == []
    with pytest.raises(ValueError, match="machine"):
        result_file(path, resume=True, gpu="NVIDIA A100")


def tiny_run(path, *more: str) -> int:
    arguments = ["--device", "cpu", "--T", "200", "--head-dim", "32", "--cases", "8/8/8", "--voxels", "gyroid", "--budget", "0"]
    return run.main([*arguments, "--impl", "ssa", "fa2", "cudnn", "--out", str(path), *more])


def test_a_run_resumes_and_reports(tmp_path, capsys):
    path = tmp_path / "a.csv"
    assert tiny_run(path, "--minutes", "0") == 0
    assert rows.read(path) == [] and "No time for 3 of 3 cases" in capsys.readouterr().out
    assert tiny_run(path, "--resume", "--pass", "fwd") == 0
    first = rows.read(path)
    assert [(row["impl"], row["pass"]) for row in first] == [("ssa", "fwd"), ("fa2", "fwd")]
    assert tiny_run(path, "--resume") == 0
    found = rows.read(path)
    assert found[:2] == first and sorted(row["pass"] for row in found if row["impl"] == "ssa") == ["both", "bwd", "fwd"]
    assert int(found[0]["pairs_cmp"]) == 32 * 200 * int(found[0]["C"]) and float(found[0]["ms"]) > 0
    text = path.with_suffix(".md").read_text()
    assert "| failed |" in text and "- cudnn T=200 D=32 (fwd, bwd, both): RuntimeError" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_meshes_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "MESH_RESOLUTIONS", (8,))
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "ball.ply")
    mesh = ["--voxels", "mesh", "--mesh", str(tmp_path / "ball.ply"), "--pass", "fwd"]
    assert tiny_run(tmp_path / "a.csv", *mesh) == 0
    own, peer = (row for row in rows.read(tmp_path / "a.csv") if row["T"] != "200")
    assert (own["voxels"], own["resolution"], peer["impl"], peer["T"]) == ("ball", "8", "fa2", own["T"])
    assert "## ball, D = 32, m_cmp/m_slc/topk = 8/8/8" in (tmp_path / "a.md").read_text()


def test_no_time_is_shown_for_a_wrong_result(tmp_path, capsys, monkeypatch):
    def red(*arguments):
        raise gate.GateError("wrong")

    monkeypatch.setattr(run, "check_forward", red)
    assert tiny_run(tmp_path / "a.csv") == 1
    assert [row["impl"] for row in rows.read(tmp_path / "a.csv")] == ["fa2"] * 3
    assert "ssa T=200 D=32 8/8/8 gyroid FAILED fwd/bwd/both: GateError: wrong" in capsys.readouterr().out


def test_slow_peers_are_left_out():
    results = [{"impl": "fa2", "pass": "both", "head_dim": "64", "T": "131072", "tflops": "300"}]
    slow = cases.Case("fa2", 262_144, 64, num_kv_heads=32)
    assert run.expected_seconds(slow, "both", results) == pytest.approx(14 * 64 * 32 * 262_144**2 / 300e12)
    assert run.expected_seconds(slow, "both", results) > run.SLOWEST_SECONDS > run.expected_seconds(slow, "fwd", results)
    assert run.expected_seconds(OWN, "both", results) == 0


def test_a_peer_left_out_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SLOWEST_SECONDS", 0.0)
    assert tiny_run(tmp_path / "a.csv", "--pass", "fwd") == 0
    assert [row["impl"] for row in rows.read(tmp_path / "a.csv")] == ["ssa"]
    assert "- fa2 T=200 D=32 (fwd): left out: about 0 s a call" in (tmp_path / "a.md").read_text()


def test_figures_of_a_row():
    pairs = cases.Pairs(4096 * 32 * 1250, 10**7, 10**6)
    got = run.figures(OWN, "fwd", timing.Timing(2.0, 1.9, 2.1, 3 * 10**9), pairs, "NVIDIA H200")
    work = cases.ssa_work("fwd", pairs, num_tokens=4096, head_dim=32, topk=8)
    assert got["tflops"] == pytest.approx(4 * 32 * pairs.total / 2e-3 / 1e12)
    assert got["limit_share"] == pytest.approx(cases.limit_seconds(work, H200) / 2e-3) and got["peak_gb"] == 3
    assert run.figures(OWN, "fwd", timing.Timing(2.0, 1.9, 2.1, None), pairs, "another")["limit_share"] is None
    dense = run.figures(PEER, "both", timing.Timing(2.0, 1.9, 2.1, None), None, "NVIDIA H200")
    assert dense["tflops"] == pytest.approx(14 * 32 * 32 * 4096**2 / 2e-3 / 1e12)


def test_peers_say_what_they_are():
    assert set(peers.describe()) == set(cases.DENSE) == set(report.PEER_NAMES)
    q, k, v = torch.randn(3, 1, 2, 40, 16).bfloat16()
    assert peers.layout("cudnn") == "bhtd"
    with pytest.raises(ValueError, match="impl='other'"):
        peers.dense_attention("other")
    if peers.layout("fa2") == "bhtd":  # the flash-attn package has no CPU path
        gate.check_dense([q[0], k[0], v[0]], peers.dense_attention("fa2")(q, k, v)[0])


# report, timing, branches, worst cases, layer, tuning


def test_report_shows_the_ratio_to_fa2_and_the_released_figures(tmp_path):
    results = result_file(tmp_path / "a.csv")
    case = cases.Case("ssa", 131_072, 32, (4, 8, 8), "gyroid", 128)
    counts = {"C": 7488, "S": 1836, "pairs_cmp": 131_072 * 32 * 7488, "pairs_slc": 4_600_000_000, "pairs_win": 300_000_000}
    for pass_, ms, fa2 in (("fwd", 25.0, 300.0), ("bwd", 40.0, 800.0)):
        results.add(replace(PEER, num_tokens=131_072), pass_, {"ms": fa2, "ms_p20": fa2, "ms_p80": fa2})
        own = results.add(case, pass_, {"ms": ms, "ms_p20": ms, "ms_p80": ms, "limit_share": 0.41} | counts)
        assert report.line(own, results.rows).endswith(f"{fa2 / ms:.2f}x FA2")
    report.write(results.path)
    text = results.path.with_suffix(".md").read_text()
    assert "| 131,072 | 7488 | 1836 | 25.0 / 40.0 | 300 / 800 | – | – | 12.0 / 20.0 | 80.8 / 90.5 | 3.79 / 8.75 | – | 41% / 41% |" in text
    assert "| 131,072 | 32 | 4/8/8 | fwd | 8.35 exp | 8.35 exp | 1.52 bytes | 0.14 bytes | 0.25 bytes | 10.3 | 18.6 | 25.0 |" in text
    assert "fa2 = a peer" in text and "NVIDIA H200" in text and "commit aaaa" in text


def test_exponent_of_a_power_law():
    assert report.exponent({T: 3e-7 * T**1.7 for T in (4096, 16_384, 1_048_576)}) == pytest.approx(1.7)


def test_timing_counts_its_repetitions():
    calls = []
    result = timing.measure(lambda: calls.append(1) or torch.zeros(1), CPU, budget=0.0)
    assert len(calls) == 2 + timing.MIN_REPEATS and result.ms_p20 <= result.ms <= result.ms_p80 and result.peak is None
    calls.clear()
    timing.measure(lambda: calls.append(1) or torch.zeros(1), CPU)
    assert len(calls) == 2 + timing.MAX_REPEATS


def test_three_calls_give_one_set_of_gradients():
    x = torch.randn(5, requires_grad=True)
    calls = timing.three_calls(lambda: x**3, (x,), torch.ones(5))
    for _ in range(2):
        torch.testing.assert_close(calls["bwd"]()[0], 3 * x.detach() ** 2)
        torch.testing.assert_close(calls["both"]()[1], 3 * x.detach() ** 2)


def test_branches_of_one_size(tmp_path):
    results = rows.ResultFile(tmp_path / "a-branches.csv", timing.environment(CPU, "aaaa"), {})
    for _ in range(2):
        branches.run_size(150, results, CPU, torch.float32, 0.0)
        found = [(row["impl"], row["pass"]) for row in rows.read(results.path)]
        assert found == [(name, pass_) for name, passes in branches.PASSES.items() for pass_ in passes]
    table = report.growth_table(rows.read(results.path))
    assert table.count("\n") == 1 + 9 and "| score + top-k | fwd |" in table
    report.plot_growth(rows.read(results.path), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_branches_run_without_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(branches, "TOKENS", (150,))
    assert branches.main(["--device", "cpu", "--T", "150", "--budget", "0", "--out", str(tmp_path / "a.csv")]) == 0
    assert len(rows.read(tmp_path / "a-branches.csv")) == 9 and "No Markdown or plot" in capsys.readouterr().out


def test_branches_add_up_to_the_operator():
    inputs = small_inputs()
    chosen = inputs.choose()
    o = [branches.branch_calls(name, inputs, chosen)["fwd"]() for name in ("cmp", "slc", "win", "all")]
    torch.testing.assert_close(sum(inputs.gates[:, i, None, None] * o[i] for i in range(3)), o[3])


def test_every_query_chooses_the_hot_block():
    inputs = worst_cases.make_case("one hot block", 1310, CPU, torch.float32)
    chosen = inputs.choose()
    assert torch.bincount(chosen[chosen >= 0].long()).max() == chosen.shape[0] * chosen.shape[1]


@pytest.mark.parametrize(
    ("name", "T", "C", "S"),
    [("unequal samples", 110_000, None, None), ("dense blocks", 131_072, 2048, 256), ("lone voxels", 16_384, 16_384, 16_384)],
)
def test_worst_cases_have_their_shape(name, T, C, S):
    partition = ssa.partition_voxels(worst_cases.make_coords(name, 131_072))
    assert partition.num_tokens == T
    if C is None:
        assert partition.cu_seqlens.diff().tolist() == [100_000] + [100] * 100
    else:
        assert (len(partition.compression), len(partition.selection)) == (C, S)


def test_worst_cases_run_anywhere(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    monkeypatch.setattr(worst_cases, "NAMES", ("random", "one hot block", "lone voxels"))
    assert worst_cases.main(["--device", "cpu", "--T", "300", "--budget", "0", "--out", str(path)]) == 0
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 3 * 2 * 3 and all(float(row["value"]) > 0 for row in found)
    assert [row["value"] for row in found if row["figure"].startswith("random") and "over" in row["figure"]] == ["1", "1"]


def test_saved_bytes_count_each_storage_once():
    x = torch.randn(100, requires_grad=True)
    assert layer.saved_bytes(lambda: x.exp().sin(), (x,)) == 400  # exp keeps its result, sin the same
    assert layer.saved_bytes(lambda: x * x, (x,)) == 0
    assert layer.saved_bytes(lambda: x * x, ()) == 400


def test_layer_benchmark_runs_anywhere(tmp_path, capsys):
    path = tmp_path / "a-layer.csv"
    assert layer.main(["--device", "cpu", "--T", "120", "--budget", "0", "--commit", "aaaa", "--out", str(path)]) == 0
    with path.open() as file:
        found = {row["figure"]: row for row in csv.DictReader(file)}
    assert len(found) == 3 + 2 * 6 + 3 * 3 and all(float(row["value"]) > 0 or "over" in name for name, row in found.items())
    assert {(row["T"], row["bound"], row["commit"]) for row in found.values()} == {("120", "", "aaaa")}
    text, shown = path.with_suffix(".md").read_text(), capsys.readouterr().out
    assert all(f"| {name} | 120 |" in text and name in shown for name in found)


def test_figures_say_what_exceeds_and_what_fails(tmp_path):
    found = figures.Figures(tmp_path / "a.csv", ENVIRONMENT, bounded=True)
    found.add("kept", 5, 2.0, "ms", 2.0)
    found.add("free", 5, 9.0, "ms")
    assert found.good
    found.add("over", 5, 2.1, "ms", 2.0)
    assert not found.good
    found.rows.pop()
    found.fail("part", 5, "out of memory")
    assert not found.good
    found.write_markdown("Figures", "python -m x", "Conditions.")
    text = (tmp_path / "a.md").read_text()
    assert "| kept | 5 | 2 ms | ≤ 2 |" in text and "| part: out of memory | 5 |   | **failed** |" in text
    assert [line.split(",")[5] for line in (tmp_path / "a.csv").read_text().splitlines()[1:]] == ["yes", "", "no", "failed"]


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "partition_times", lambda bench: 1 / 0)
    monkeypatch.setattr(layer, "figures_of_layer", lambda figures, T, *rest: figures.add("x", T, 1.0, "ms"))
    monkeypatch.setattr(layer, "COMPRESSORS", ())
    assert layer.main(["--device", "cpu", "--T", "20", "--out", str(tmp_path / "a.csv")]) == 1
    with (tmp_path / "a.csv").open() as file:
        assert [row["kept"] for row in csv.DictReader(file)] == ["failed", ""]


@pytest.mark.parametrize("name", tune.KERNELS)
def test_tuner_knows_the_kernels(name):
    module_name, kernel, branch, pass_ = tune.KERNELS[name]
    module = importlib.import_module(f"ssa.kernels.{module_name}")
    assert (next(iter(inspect.signature(module._config).parameters)) == "kernel") == (kernel is not None)
    assert pass_ in branches.PASSES[branch]
    before = module._config
    with tune.override(module, kernel, {"BLOCK_M": 1}):
        assert module._config(kernel) == {"BLOCK_M": 1}
    assert module._config is before


def test_settings_one_step_away():
    setting = {"BLOCK_M": 16, "SHARE": 4, "maxnreg": 100}
    changed = [{k: v for k, v in other.items() if v != setting[k]} for other in tune.neighbours(setting)]
    assert changed == [{"BLOCK_M": 32}, {"SHARE": 0}, {"SHARE": 8}, {"maxnreg": 96}, {"maxnreg": 128}]


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("name", tune.KERNELS)
def test_every_number_of_a_setting_can_be_tuned(name, head_dim):
    module_name, kernel, *_ = tune.KERNELS[name]
    config = importlib.import_module(f"ssa.kernels.{module_name}")._config
    options = {"kernel": kernel, "head_dim": head_dim, "dtype": torch.bfloat16, "long": True, "group": 16}
    setting = config(**{parameter: options[parameter] for parameter in inspect.signature(config).parameters})
    assert {k for other in tune.neighbours(setting) for k in setting if other[k] != setting[k]} == set(setting)


def test_search_walks_to_the_best_setting():
    def evaluate(setting):
        if setting["num_stages"] > 3:
            return None
        return abs(setting["BLOCK_M"] - 128) + abs(setting["num_warps"] - 8) + 10.0 - setting["num_stages"]

    seen = []
    start = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}
    best, ms = tune.search(start, evaluate, lambda setting, ms: seen.append(tuple(setting.values())))
    assert best == {"BLOCK_M": 128, "num_warps": 8, "num_stages": 3} and ms == 7.0
    assert len(seen) == len(set(seen))


def test_a_setting_that_changes_the_result_is_not_the_same():
    o, ids = torch.randn(100), torch.arange(2000)
    assert tune.same((o * 1.001, ids), (o, ids))
    assert not tune.same((o * 1.05, ids), (o, ids))
    assert not tune.same((o.clone().fill_(float("nan")), ids), (o, ids))
    assert not tune.same((o, ids.roll(1)), (o, ids))
