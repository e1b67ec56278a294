"""The correctness gate: no time is printed for a case that has not passed it.

The reference here is written from the coordinates alone, for a few queries at a time, so that it reaches any T. All gradients are
compared with `impl="naive"` where T is small, and up to 131,072 tokens also those of some queries and compression blocks of the case.
Bound on an error: twice what the reference itself errs in the same precision, plus one rounding of the largest value.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import ssa

from .cases import GYROID_COUNTS, Case, Inputs, make_inputs
from .voxels import gyroid

QUERIES, CHUNK = 64, 8
KEYS, KEY_CHUNK = 16, 512  # compression blocks whose gradients are checked; queries at a time, all of them
MOST_TOKENS = 131_072  # of that check, which looks at every pair of a query and a block in fp64
GRADIENT_TOKENS, GRADIENT_RESOLUTION = 480, 32  # 56 selection blocks, so that every topk leaves some out
SCORE_MARGIN = 1e-5  # times G: what a chosen block may lie below one left out
NEAR_TIES = 1e-3  # share of rows that may differ where two evaluations of the scores broke a tie differently


class GateError(AssertionError):
    """A result is wrong, so its time means nothing."""


def check_counts(case: Case, partition: ssa.VoxelPartition) -> None:
    """The voxels are the ones the table speaks of: C and S of the gyroid where they are known."""
    if case.voxels == "gyroid":
        for blocks in (partition.compression, partition.selection):
            expected = GYROID_COUNTS.get(case.num_tokens, {}).get(blocks.size)
            if expected not in (None, len(blocks)):
                raise GateError(f"{case}: blocks of edge {blocks.size} must number {expected}, got {len(blocks)}")


def check_forward(inputs: Inputs, topk_indices: Tensor, queries: int = QUERIES) -> None:
    """The operator on random queries against the reference, with the choice given and with its own; the choice by its scores."""
    T, device = inputs.partition.num_tokens, inputs.q.device
    rows = torch.randperm(T, generator=torch.Generator().manual_seed(1))[:queries].sort().values.to(device)
    with torch.no_grad():
        frozen = inputs.attend(topk_indices)
        own = inputs.attend()
        exact = torch.cat([reference(inputs, part, topk_indices, torch.float64) for part in rows.split(CHUNK)])
        low = torch.cat([reference(inputs, part, topk_indices, inputs.q.dtype) for part in rows.split(CHUNK)])
        for part in rows.split(CHUNK):
            check_choice(inputs, part, topk_indices)
    check_close("o", frozen[rows], exact, low)
    differing = float((own - frozen).abs().flatten(1).amax(1).gt(_bound(exact, low)).float().mean())
    if not differing <= NEAR_TIES:
        raise GateError(f"o with its own choice must equal o with that choice given: {differing:.2%} of the rows differ")


def check_backward(inputs: Inputs, topk_indices: Tensor) -> None:
    """dq and dgates of random queries, dk_cmp and dv_cmp of random compression blocks, with the choice given; up to MOST_TOKENS tokens."""
    T, C, device = inputs.partition.num_tokens, len(inputs.partition.compression), inputs.q.device
    if T > MOST_TOKENS:
        return
    draw = torch.Generator().manual_seed(2)
    rows, blocks = (torch.randperm(n, generator=draw)[:most].sort().values.to(device) for n, most in ((T, QUERIES), (C, KEYS)))
    dq, _, _, dk_cmp, dv_cmp, dgates = torch.autograd.grad(inputs.attend(topk_indices), inputs.leaves, inputs.do)
    ours = (dq[rows], dgates[rows], dk_cmp[blocks], dv_cmp[blocks])

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        of_rows = [query_gradients(inputs, part, topk_indices, dtype) for part in rows.split(CHUNK)]
        return *(torch.cat(x) for x in zip(*of_rows, strict=True)), *block_gradients(inputs, blocks, dtype)

    for name, got, low, exact in zip(
        ("dq", "dgates", "dk_cmp", "dv_cmp"), ours, gradients(inputs.q.dtype), gradients(torch.float64), strict=True
    ):
        check_close(name, got, exact, low)


@lru_cache(maxsize=16)
def check_gradients(head_dim: int, blocks: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
    """o and all six gradients against the dense definition in fp64 over a small gyroid; once for every setting."""
    inputs = make_inputs(gyroid(GRADIENT_TOKENS, GRADIENT_RESOLUTION), head_dim, blocks, device=device, dtype=dtype, seed=2)
    topk_indices = inputs.choose()

    def gradients(impl: str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        cast = inputs.to(dtype)
        o = cast.attend(topk_indices, impl)
        return o.detach(), *torch.autograd.grad(o, cast.leaves, cast.do)

    ours, low, exact = gradients(None, dtype), gradients("naive", dtype), gradients("naive", torch.float64)
    for name, got, rough, right in zip(("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgates"), ours, low, exact, strict=True):
        check_close(name, got, right, rough)


def check_close(name: str, got: Tensor, exact: Tensor, low: Tensor) -> None:
    """|got − exact| ≤ 2 max |low − exact| + one rounding of max |exact|, everywhere; NaN fails."""
    error, bound = float((got.double() - exact).abs().max()), _bound(exact, low)
    if not error <= bound:
        raise GateError(f"{name} must be within {bound:.3g} of the reference, got {error:.3g}")


def _bound(exact: Tensor, low: Tensor) -> float:
    return 2 * float((low.double() - exact).abs().max()) + torch.finfo(low.dtype).eps * float(exact.abs().max())


def check_choice(inputs: Inputs, rows: Tensor, topk_indices: Tensor) -> None:
    """min(topk, blocks of the sample) blocks a row, ascending, −1 after, none below one left out by more than the margin."""
    scores = block_scores(inputs, rows)  # [n, Hkv, S], −1 where the block is of another sample
    chosen = topk_indices[rows].long()
    valid = chosen >= 0
    expected = (scores >= 0).sum(2).clamp(max=inputs.topk)
    count = valid.sum(2)
    ordered = (~valid[..., 1:] | ((chosen[..., 1:] > chosen[..., :-1]) & valid[..., :-1])).all()
    if not (torch.equal(count, expected) and ordered):
        raise GateError(f"topk_indices must hold min(topk, S) ascending blocks, −1 after: {chosen[count != expected][:1].tolist()}")
    taken = _one_hot(chosen, scores.shape[2])
    least = torch.where(taken, scores, torch.inf).amin(2)
    best_left = torch.where(taken, -1.0, scores).amax(2)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    gap = float((best_left - least).max())
    if not gap <= SCORE_MARGIN * group:
        raise GateError(f"no chosen block may score below one left out by over {SCORE_MARGIN * group:.1e}, got {gap:.3g}")


def block_scores(inputs: Inputs, rows: Tensor) -> Tensor:
    """Scores [n, Hkv, S] of every selection block in fp64: p of the compression attention summed over heads and children."""
    partition = inputs.partition
    p = _softmax(inputs.q[rows].detach().double(), inputs.k_cmp.detach().double(), _same_sample(partition, rows)[:, None])
    n, S = rows.shape[0], len(partition.selection)
    scores = p.new_zeros(n, p.shape[1], S).index_add_(2, partition.parents.long(), p.sum(2))
    other = partition.selection.coords[:, 0] != partition.coords[rows, 0, None]
    return scores.masked_fill(other[:, None], -1.0)


def reference(inputs: Inputs, rows: Tensor, topk_indices: Tensor, dtype: torch.dtype) -> Tensor:
    """o [n, Hq, D] of the queries `rows` in `dtype`: three softmaxes over explicit masks, gated and summed."""
    q, gates = (x.detach()[rows].to(dtype) for x in (inputs.q, inputs.gates))
    return _attend_rows(inputs, rows, topk_indices, q, gates)


def query_gradients(inputs: Inputs, rows: Tensor, topk_indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dq [n, Hq, D] and dgates [n, 3] of the queries `rows`: those of `reference`."""
    leaves = tuple(x.detach()[rows].to(dtype).requires_grad_() for x in (inputs.q, inputs.gates))
    o = _attend_rows(inputs, rows, topk_indices, *leaves)
    dq, dgates = torch.autograd.grad(o, leaves, inputs.do[rows].to(dtype))
    return dq, dgates


def block_gradients(inputs: Inputs, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dk_cmp and dv_cmp [n, Hkv, D] of compression blocks: every query's p and ds = p (do v − Σ_j p_j do v_j), summed in fp32 or fp64."""
    Hkv, D = inputs.k_cmp.shape[1:]
    k, v = (x.detach().to(dtype) for x in (inputs.k_cmp, inputs.v_cmp))
    dk, dv = torch.zeros(2, len(blocks), Hkv, D, device=k.device, dtype=torch.promote_types(dtype, torch.float32))
    for rows in torch.arange(inputs.partition.num_tokens, device=k.device).split(KEY_CHUNK):
        q, do, gates = (x.detach()[rows].to(dtype) for x in (inputs.q, inputs.do, inputs.gates))
        q, do = (x.view(len(rows), Hkv, -1, D) for x in (q, do * gates[:, :1, None]))
        p = _softmax(q.flatten(1, 2), k, _same_sample(inputs.partition, rows)[:, None])
        delta = (torch.einsum("nhgk,khd->nhgd", p, v) * do).sum(3, keepdim=True)
        p = p[..., blocks]
        ds = p * (torch.einsum("nhgd,khd->nhgk", do, v[blocks]) - delta) * D**-0.5
        dk += torch.einsum("nhgk,nhgd->khd", ds, q)
        dv += torch.einsum("nhgk,nhgd->khd", p, do)
    return dk.to(dtype), dv.to(dtype)


def _attend_rows(inputs: Inputs, rows: Tensor, topk_indices: Tensor, q: Tensor, gates: Tensor) -> Tensor:
    """`reference` of q [n, Hq, D] and gates [n, 3] at `rows`."""
    partition, m = inputs.partition, inputs.partition.window.size
    k, v, k_cmp, v_cmp = (x.detach().to(q.dtype) for x in (inputs.k, inputs.v, inputs.k_cmp, inputs.v_cmp))
    windows = torch.cat([partition.coords[:, :1], (partition.coords[:, 1:] + partition.window_shift).div(m, rounding_mode="floor")], 1)
    same_window = (windows == windows[rows][:, None]).all(2)
    fill = partition.selection.offsets.diff().long()
    block_of_token = torch.repeat_interleave(torch.arange(len(fill), device=fill.device), fill)
    taken = _one_hot(topk_indices[rows].long(), len(fill))
    branches = (
        _attention(q, k_cmp, v_cmp, _same_sample(partition, rows)[:, None]),
        _attention(q, k, v, taken[:, :, block_of_token]),
        _attention(q, k, v, same_window[:, None]),
    )
    return sum((gates[:, i, None, None] * o for i, o in enumerate(branches)), torch.zeros_like(q))


def check_dense(qkv: list[Tensor], o: Tensor, queries: int = 8) -> None:
    """Dense attention of a peer, q, k, v and o each [H, T, D], on random queries."""
    q, k, v = qkv
    rows = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))[:queries].to(q.device)

    def attend(dtype: torch.dtype) -> Tensor:
        query, key, value = q[:, rows].to(dtype), k.to(dtype), v.to(dtype)
        return (query @ key.mT * q.shape[2] ** -0.5).softmax(-1) @ value

    check_close("o", o[:, rows], attend(torch.float64), attend(q.dtype))


def _one_hot(chosen: Tensor, num_blocks: int) -> Tensor:
    """Block ids [n, Hkv, topk], −1 = none → [n, Hkv, S] bool."""
    taken = torch.zeros(*chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=chosen.device)
    return taken.scatter_(2, torch.where(chosen < 0, num_blocks, chosen), True)[..., :-1]


def _same_sample(partition: ssa.VoxelPartition, rows: Tensor) -> Tensor:
    """[n, C] bool: the compression blocks of each query's sample."""
    return partition.compression.coords[:, 0] == partition.coords[rows, 0, None]


def _softmax(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """q [n, Hq, D], k [N, Hkv, D], visible [n, 1 or Hkv, N] → p [n, Hkv, G, N]."""
    n, Hq, D = q.shape
    s = torch.einsum("nhgd,khd->nhgk", q.view(n, k.shape[1], -1, D), k) * D**-0.5
    return s.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return torch.einsum("nhgk,khd->nhgd", _softmax(q, k, visible), v).reshape(q.shape)
