"""The inner loops of attention, shared by the branches: what happens between a tile of rows and a range of keys.

    forward  s = scale q kᵀ, p = exp(s − m), o = p v      backward  ds = p (do vᵀ − delta), dq = ds k, dv = pᵀ do, dk = dsᵀ q

Rows are (query, head) pairs of one key/value head, see common.py. GATHER says where position i of a grouping lies: 0: at row i itself;
n > 0: at row index[i] // n (windows: n = 1; the inverse map of the selection, whose entries are (t Hkv + kv) topk + slot: n = Hkv · topk);
LINE: at i plus the shift of the last block that begins at or before i, index being (begins, shifts), see selected_attention_by_query.py.
Loops run over full tiles without a mask and once more, masked, over the rest. Exponentials are base 2 with the scale folded in; in fp32
the exponent is formed in natural units first, so that exp(lse − lse) is exactly 1.
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, LOG2E_LOW, load_rows

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits
LINE = tl.constexpr(-1)
MAX_BOUND = tl.constexpr(50.0)  # in powers of two: scores then span at most 2^±50, far inside the 2^±126 of fp32 and bf16


@triton.jit
def exponent_unit(x, scale):
    """(factor of a score, factor of an lse) in the units of `exp_of`."""
    if x.dtype == tl.float32:
        score, lse = scale, 1.0
    else:
        score, lse = scale * LOG2E, LOG2E
    return score, lse


@triton.jit
def exp_of(x, s):
    """exp of s, given in natural units where x is fp32 and in powers of two otherwise."""
    if x.dtype == tl.float32:
        # s log2 e in two parts: rounding it once would cost |s| roundings of the result
        s = s.to(tl.float32)
        high = s * LOG2E
        low = tl.fma(s, LOG2E, -high) + s * LOG2E_LOW
        p = tl.exp2(high)
        p += tl.where(s > -100.0, p * low * LN2, 0.0)
    else:
        p = tl.exp2(s)
    return p


@triton.jit
def store_stats(ptr, row, x, lse, delta, mask):
    """What the backward asks of a row, side by side: its lse in the unit of `exp_of` of x, and its delta."""
    _, unit = exponent_unit(x, 1.0)
    kind = ptr.dtype.element_ty
    pair = tl.join((lse * unit).to(kind), delta.to(kind))
    tl.store(ptr + row[:, None] * 2 + tl.arange(0, 2)[None, :], pair, mask=mask[:, None])


@triton.jit
def load_stats(ptr, row, mask, MASKED: tl.constexpr):
    """lse and delta of rows; inf and 0, so that p = 0, where the mask is off."""
    stats_ptr = ptr + row[:, None] * 2 + tl.arange(0, 2)[None, :]
    if MASKED:
        lse, delta = tl.split(tl.load(stats_ptr, mask=mask[:, None], other=0.0))
        lse = tl.where(mask, lse, float("inf"))
    else:
        lse, delta = tl.split(tl.load(stats_ptr))
    return lse, delta


@triton.jit
def wide(q, x):
    """x in fp64 where q is fp32: lse and delta, a value a row."""
    if q.dtype == tl.float32:
        x = x.to(tl.float64)
    return x


@triton.jit
def _dp(a, b, delta, PRECISION: tl.constexpr):
    """a bᵀ with as many digits as delta, which is subtracted from it and nearly cancels."""
    if delta.dtype == tl.float64:
        dp = tl.dot(a.to(tl.float64), b.to(tl.float64).T, out_dtype=tl.float64)
    else:
        dp = tl.dot(a, b.T, input_precision=PRECISION)
    return dp


@triton.jit
def _add_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; tile by tile in fp64 where acc is, since one chain of fp32 sums over all queries rounds too often."""
    if acc.dtype == tl.float64:
        acc += tl.dot(a, b, input_precision=PRECISION).to(tl.float64)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _exp2_fma(x):
    """2^x for x ≤ 126, below 2^-126 no less than that: integer part to the exponent, a polynomial (relative error 2.6e-6) for the rest."""
    x = tl.maximum(x, -126.0)
    shifted = x + ROUND
    f = x - (shifted - ROUND)
    p = 0.009570080127 * f + 0.055917837456
    p = p * f + 0.240247450670
    p = p * f + 0.693121817623
    p = p * f + 0.999999261472
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _exp2_half(x, M: tl.constexpr, N: tl.constexpr):
    """2^x of x [M, N, 4], every other N by polynomial."""
    x, y = tl.split(tl.permute(tl.reshape(x, [M, N // 2, 2, 4]), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(tl.exp2(x), _exp2_fma(y)), (0, 1, 3, 2)), [M, N, 4])


@triton.jit
def exp_shared(q, s, M: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr):
    """`exp_of` of s [M, N], one in SHARE (4, 8; 0: none) by polynomial on the FMA units, since the unit for exp is the bottleneck.

    Columns 16 a + 8 b + 2 c + d split by b and d, and by a: the accumulator of a matrix product keeps these in one thread, nothing moves.
    """
    if SHARE == 0 or q.dtype == tl.float32:
        p = exp_of(q, s)
    else:
        x, y = tl.split(tl.permute(tl.reshape(s, [M, N // 16, 2, 4, 2]), (0, 1, 3, 2, 4)))
        y, z = tl.split(y)
        z = _exp2_fma(z) if SHARE == 4 else _exp2_half(z, M, N // 16)
        y = tl.join(tl.exp2(y), z)
        p = tl.reshape(tl.permute(tl.join(tl.exp2(x), y), (0, 1, 3, 2, 4)), [M, N])
    return p


@triton.jit
def packed_rows(index_ptr, first, count, kv, HQ: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, GATHER: tl.constexpr):
    """Which rows of a tile are real, and their numbers among the T · Hq rows of q."""
    r = tl.arange(0, BLOCK_M)
    valid = r // G < count
    if GATHER > 0:
        t = (tl.load(index_ptr + first + r // G, mask=valid, other=0) // GATHER).to(tl.int64)
        row = t * HQ + kv * G + r % G
    else:
        row = (first * HQ + kv * G).to(tl.int64) + (r // G * HQ + r % G)
    return valid, row


@triton.jit
def _rows_of_line(begins, shifts, j):
    """Of positions j of a line, by bisection: in a warp, a lane asks another for what it holds."""
    block = tl.zeros_like(j)
    for i in tl.static_range(1, 7):  # of up to 64 blocks
        if begins.shape[0] >> i > 0:
            block += tl.where(tl.gather(begins, block + (begins.shape[0] >> i), 0) <= j, begins.shape[0] >> i, 0)
    return j + tl.gather(shifts, block, 0)


@triton.jit
def _keys(
    k_ptr, v_ptr, index_ptr, kv, start, hi, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K and V of positions start … start + BLOCK_N, and which of them lie before hi."""
    n = tl.arange(0, BLOCK_N)
    valid = start + n < hi
    if GATHER > 0:
        at = ((tl.load(index_ptr + start + n, mask=valid, other=0) // GATHER).to(tl.int64) * HKV + kv) * D
        k = load_rows(k_ptr, at, valid, D, BLOCK_D)
        v = load_rows(v_ptr, at, valid, D, BLOCK_D)
    elif GATHER == LINE:
        at = _rows_of_line(index_ptr[0], index_ptr[1], start + n).to(tl.int64) * (HKV * D) + kv * D
        k = load_rows(k_ptr, at, valid, D, BLOCK_D, MASKED)
        v = load_rows(v_ptr, at, valid, D, BLOCK_D, MASKED)
    else:
        base = (start * HKV + kv).to(tl.int64) * D
        k = load_rows(k_ptr + base, n * (HKV * D), valid, D, BLOCK_D, MASKED)
        v = load_rows(v_ptr + base, n * (HKV * D), valid, D, BLOCK_D, MASKED)
    return k, v, valid


@triton.jit
def _forward_loop(
    acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, lo, hi, unit, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        k, v, valid = _keys(k_ptr, v_ptr, index_ptr, kv, start, hi, HKV, D, BLOCK_D, BLOCK_N, GATHER, MASKED)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            s = tl.where(valid[None, :], s, -float("inf"))
        if BOUNDED:
            p = exp_of(q, s * unit - m_i[:, None])
            l_i += tl.sum(p, 1)
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1) * unit)
            p = exp_of(q, s * unit - m_new[:, None])
            alpha = exp_of(q, m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc *= alpha[:, None]
            m_i = m_new
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def forward_rows(
    q, k_norm, k_ptr, v_ptr, index_ptr, kv, lo, hi, scale, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [BLOCK_M, BLOCK_D] and lse [BLOCK_M] (natural log) of rows over keys lo … hi; no keys at all give 0 and −inf.

    Where |q| max|k| bounds every score well inside the range of the exponent, exp(s − bound) needs no running maximum. The bound is
    checked for every tile, so both ways are exact; BOUNDED False leaves the quick way out. The ways follow each other, one of them
    over no keys: as branches their buffers would share no memory.
    """
    unit, lse_unit = exponent_unit(q, scale)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    full = lo + (hi - lo) // BLOCK_N * BLOCK_N
    quick = lo  # keys before it need no running maximum
    if BOUNDED:
        q32 = q.to(tl.float32)
        bound = tl.sqrt(tl.sum(q32 * q32, 1)) * k_norm * unit
        small = tl.max(bound, 0) <= MAX_BOUND  # false where k_norm is NaN; a row of q that is one spoils itself alone
        m_i = tl.where(small, bound, m_i)
        quick = tl.where(small, full, lo)
        acc, m_i, l_i = _forward_loop(
            acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, lo, quick, unit, HKV, D, BLOCK_D, BLOCK_N, GATHER, False, True, PRECISION
        )
    acc, m_i, l_i = _forward_loop(
        acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, quick, full, unit, HKV, D, BLOCK_D, BLOCK_N, GATHER, False, False, PRECISION
    )
    acc, m_i, l_i = _forward_loop(
        acc, m_i, l_i, q, k_ptr, v_ptr, index_ptr, kv, full, hi, unit, HKV, D, BLOCK_D, BLOCK_N, GATHER, True, False, PRECISION
    )
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    o = acc * tl.div_rn(1.0, l_i)[:, None]  # one exact division a row; `/` is approximate on a GPU
    return o, tl.where(empty, -float("inf"), wide(q, m_i) / lse_unit + tl.log(wide(q, l_i)))


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, lo, hi, unit, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        k, v, valid = _keys(k_ptr, v_ptr, index_ptr, kv, start, hi, HKV, D, BLOCK_D, BLOCK_N, GATHER, MASKED)
        p = exp_of(q, tl.dot(q, k.T, input_precision=PRECISION).to(lse.dtype) * unit - lse[:, None])
        if MASKED:
            p = tl.where(valid[None, :], p, 0.0)
        ds = p * (_dp(do, v, delta, PRECISION) - delta[:, None])
        dq = _add_dot(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def dq_keys(
    q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, lo, hi, scale, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [BLOCK_M, BLOCK_D] of rows with their lse and delta (`load_stats`) from keys lo … hi."""
    dq = tl.zeros([BLOCK_M, BLOCK_D], lse.dtype)
    unit, _ = exponent_unit(q, scale)
    full = lo + (hi - lo) // BLOCK_N * BLOCK_N
    dq = _dq_loop(
        dq, q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, lo, full, unit, HKV, D, BLOCK_D, BLOCK_N, GATHER, False, PRECISION
    )
    dq = _dq_loop(
        dq, q, do, lse, delta, k_ptr, v_ptr, index_ptr, kv, full, hi, unit, HKV, D, BLOCK_D, BLOCK_N, GATHER, True, PRECISION
    )
    return dq * scale


@triton.jit
def _dkv_loop(
    dk, dv, k, v, q_ptr, do_ptr, stats_ptr, index_ptr, kv, lo, hi, end, scale, HQ: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    some: tl.constexpr = MASKED or BLOCK_Q * G != BLOCK_M
    unit, _ = exponent_unit(k, scale)
    r = tl.arange(0, BLOCK_M)
    for start in range(lo, hi, BLOCK_Q):
        valid = r // G < tl.minimum(end - start, BLOCK_Q)
        if GATHER > 0:
            if some:
                at = tl.load(index_ptr + start + r // G, mask=valid, other=0)
            else:
                at = tl.load(index_ptr + start + r // G)
            base, row = 0, (at.to(tl.uint32) // GATHER).to(tl.int64) * HQ + (kv * G + r % G)
        else:
            base, row = (start * HQ + kv * G).to(tl.int64), r // G * HQ + r % G
        q = load_rows(q_ptr + base * D, row * D, valid, D, BLOCK_D, some)
        do = load_rows(do_ptr + base * D, row * D, valid, D, BLOCK_D, some)
        lse, delta = load_stats(stats_ptr + base * 2, row, valid, some)
        if k.dtype == tl.float32:
            s = tl.dot(q, k.T, input_precision=PRECISION).T  # the forward's own product: a large score must round alike
        else:
            s = tl.dot(k, q.T, input_precision=PRECISION)
        # few rows leave registers for dp beside s: its product then runs beside the exponentials; in fp64 it takes too much memory
        early: tl.constexpr = BLOCK_M <= 32 and k.dtype != tl.float32
        if early:
            dp = _dp(v, do, delta, PRECISION)
        p = exp_of(k, s.to(lse.dtype) * unit - lse[None, :])  # [BLOCK_N, BLOCK_M]
        dv = _add_dot(p.to(do.dtype), do, dv, PRECISION)
        if not early:
            dp = _dp(v, do, delta, PRECISION)
        ds = p * (dp - delta[None, :])
        dk = _add_dot(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def dkv_rows(
    dk, dv, k, v, q_ptr, do_ptr, stats_ptr, index_ptr, kv, lo, hi, scale, HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the queries at positions lo … hi to dk (before its scale) and dv."""
    full = lo + (hi - lo) // (BLOCK_M // G) * (BLOCK_M // G)
    dk, dv = _dkv_loop(
        dk, dv, k, v, q_ptr, do_ptr, stats_ptr, index_ptr, kv, lo, full, hi, scale, HQ, G, D, BLOCK_D, BLOCK_M, GATHER,
        False, PRECISION,
    )  # fmt: skip
    return _dkv_loop(
        dk, dv, k, v, q_ptr, do_ptr, stats_ptr, index_ptr, kv, full, hi, hi, scale, HQ, G, D, BLOCK_D, BLOCK_M, GATHER,
        True, PRECISION,
    )  # fmt: skip
