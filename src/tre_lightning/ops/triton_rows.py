"""The passes over the logits as Triton kernels, for CUDA: summary, wide regions, gradient.

The functions, arguments and results are those of :mod:`tre_lightning.ops.torch_rows`, where
float64 logits are passed on to. Logits in bfloat16, float16 and float32 are read in their own dtype
and computed with in float32; nothing of their size is allocated. Their last axis must be dense.

Triton's maximum passes over NaN; NaN reaches the results through the sums.
"""

# The bodies of kernels have no types, and Triton's own types take a launch for a call of the body.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False
# mypy: disallow-untyped-calls=False, disallow-incomplete-defs=False
# mypy: disable-error-code="arg-type,call-arg,misc,operator"

import math
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from tre_lightning.entropy import Region, min_p_threshold
from tre_lightning.ops import torch_rows
from tre_lightning.ops.region import BLOCK, RegionRows, Summary, as_computed

_TILE = 64 * BLOCK  # tokens that one program streams through
_LOOP = 512  # tokens, or blocks, of one step where one program goes through a row
_CHUNK = 64  # tokens of a list that one program compares with the whole list
# Bits at the end of a float32 that are the same in every number of the dtype.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
_LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2.0))
# x / temperature has the same bits in every kernel, whatever is done with it next.
_EXACT = {"enable_fp_fusion": False}


def summarise(logits: Tensor, temperature: float) -> Summary:
    """Norm, entropy and blocks of ``softmax(logits / temperature)``, ``[N, V]``, from one read."""
    if logits.dtype == torch.float64:
        return torch_rows.summarise(logits, temperature)
    count, vocabulary = logits.shape
    blocks, tiles = triton.cdiv(vocabulary, BLOCK), triton.cdiv(vocabulary, _TILE)
    sizes = [blocks, blocks, tiles, tiles, tiles]
    parts = [logits.new_empty((count, size), dtype=torch.float32) for size in sizes]
    block_max, block_mass = parts[:2]
    log_norm, entropy = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    inverse = _inverse(temperature)
    with torch.cuda.device_of(logits):
        _tile_sums[(count * tiles,)](
            logits,
            logits.stride(0),
            vocabulary,
            blocks,
            tiles,
            inverse * _LOG2_E,
            *parts,
            BLOCK=BLOCK,
            BLOCKS=_TILE // BLOCK,
            num_warps=8,
            **_EXACT,
        )
        _row_sums[(count,)](
            blocks,
            tiles,
            inverse,
            inverse * _LOG2_E,
            *parts,
            log_norm,
            entropy,
            TILES=triton.next_power_of_2(tiles),
            LOOP=_LOOP,
            num_warps=4,
            **_EXACT,
        )
    # Divided by torch, as the candidates are: a tie across the edge shows by bitwise equality.
    return Summary(log_norm, entropy, as_computed(block_max, temperature), block_mass)


def read(
    logits: Tensor,
    temperature: float,
    summary: Summary,
    region: Region,
    rows: Tensor,
    out: RegionRows,
) -> None:
    """Fill in the regions of some rows from all their logits.

    The smallest logit of a nucleus or top k is found four bits of its float at a time, from the
    top: each pass over the row takes the mass, or the number of tokens, above 16 thresholds. That
    is 4 passes for bfloat16, 5 for float16 and 8 for float32, and one more for the tokens that tie.
    Of min_p the threshold is known, and one pass is all.
    """
    if logits.dtype == torch.float64:
        torch_rows.read(logits, temperature, summary, region, rows, out)
        return
    wanted = region.top_p or float(region.top_k or 0)
    if region.min_p is not None:
        peak = summary.block_max.index_select(0, rows).amax(1)
        out.threshold[rows] = min_p_threshold(peak, region.min_p)
    with torch.cuda.device_of(logits):
        _read[(len(rows),)](
            logits,
            logits.stride(0),
            logits.shape[1],
            _inverse(temperature),
            summary.log_norm,
            rows,
            # A number would reach the kernel in float32.
            torch.full((1,), wanted, dtype=torch.float64, device=logits.device),
            out.entropy,
            out.size,
            out.mass,
            out.tail_mass,
            out.threshold,
            out.last,
            NUCLEUS=region.top_p is not None,
            SEARCH=region.min_p is None,
            UNUSED=_UNUSED_BITS[logits.dtype],
            LOOP=_LOOP,
            num_warps=8,
            **_EXACT,
        )


def gradient(
    logits: Tensor,
    temperature: float,
    log_norm: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    factor: Tensor,
    wide: Sequence[tuple[RegionRows, Tensor, Tensor]],
    out: Tensor,
) -> None:
    """Write p_j * f_j, plus additions at some tokens, to ``out``, which may be ``logits``.

    See :func:`tre_lightning.ops.torch_rows.gradient` for the arguments.
    """
    if logits.dtype == torch.float64:
        torch_rows.gradient(logits, temperature, log_norm, ids, at_ids, factor, wide, out)
        return
    (count, vocabulary), listed = logits.shape, ids.shape[1]
    row_parts = [log_norm.contiguous(), factor.contiguous()]
    if wide:
        columns = [
            (region.threshold, region.last, slope.where(region.wide, 0.0), level)
            for region, slope, level in wide
        ]
        row_parts += [torch.stack(column, 1) for column in zip(*columns, strict=True)]
    else:
        row_parts += [log_norm] * 4  # never read
    shared = (logits, logits.stride(0), _inverse(temperature), *row_parts)
    # These elements are summed before they are rounded to the dtype, and before `out` overwrites
    # the logits that they come from.
    sums = logits.new_empty(ids.shape)
    chunks, tiles = triton.cdiv(listed, _CHUNK), triton.cdiv(vocabulary, _TILE)
    with torch.cuda.device_of(logits):
        _sums_at_ids[(count * chunks,)](
            *shared,
            ids.contiguous(),
            at_ids.contiguous(),
            listed,
            chunks,
            sums,
            WIDE=len(wide),
            CHUNK=_CHUNK,
            num_warps=4,
            **_EXACT,
        )
        _products[(count * tiles,)](
            *shared,
            vocabulary,
            tiles,
            out,
            out.stride(0),
            WIDE=len(wide),
            TILE=_TILE,
            num_warps=8,
            **_EXACT,
        )
    out.scatter_(1, ids, sums)  # a token that is listed twice has the same sum twice


def _inverse(temperature: float) -> float:
    """1 / temperature in float32, by which torch multiplies on CUDA where it divides by a float."""
    return float(torch.ones((), dtype=torch.float32, device="cpu") / temperature)


@triton.jit
def _tile_sums(
    logits,
    stride,
    vocabulary,
    blocks,
    tiles,
    scale,
    block_max,
    block_sum,
    tile_max,
    tile_sum,
    tile_moment,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Of each block and tile the largest logit m and sum of 2^d, and of the tile that of 2^d * d.

    d is (x - m) * scale, the logarithm to base 2 relative to the largest.
    """
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * stride + ids, mask=ids < vocabulary, other=float("-inf"))
    x = x.to(tl.float32)
    peak = tl.max(x, axis=1)
    tl.store(block_max + row * blocks + block, peak, mask=block < blocks)
    origin = tl.where(peak == float("-inf"), 0.0, peak)
    d = (x - origin[:, None]) * scale
    power = tl.exp2(d)
    total = tl.sum(power, axis=1)
    tl.store(block_sum + row * blocks + block, total, mask=block < blocks)
    # A token at -inf adds nothing, but 0 * -inf would.
    moment = tl.sum(tl.where(d == float("-inf"), 0.0, power * d), axis=1)
    top = tl.max(peak, axis=0)
    d_block = (origin - tl.where(top == float("-inf"), 0.0, top)) * scale
    # A block of nothing but -inf lies at its origin, 0, which may be far above the others.
    power_block = tl.where(peak == float("-inf"), 0.0, tl.exp2(d_block))
    moment = tl.where(peak == float("-inf"), 0.0, power_block * (moment + total * d_block))
    at = row * tiles + tile
    tl.store(tile_max + at, top)
    tl.store(tile_sum + at, tl.sum(power_block * total, axis=0))
    tl.store(tile_moment + at, tl.sum(moment, axis=0))


@triton.jit
def _row_sums(
    blocks,
    tiles,
    inverse,
    scale,
    block_max,
    block_mass,
    tile_max,
    tile_sum,
    tile_moment,
    log_norm,
    entropy,
    TILES: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Put a row's tiles together; turn the sums of its blocks into probabilities, in place."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    within = tile < tiles
    at = row * tiles + tile
    peak = tl.load(tile_max + at, mask=within, other=float("-inf"))
    part = tl.load(tile_sum + at, mask=within, other=0.0)
    moment = tl.load(tile_moment + at, mask=within, other=0.0)
    top = tl.max(peak, axis=0)
    d = (peak - top) * scale  # NaN in a row of nothing but -inf
    power = tl.exp2(d)
    total = tl.sum(power * part, axis=0)
    moment = tl.where(peak == float("-inf"), 0.0, power * (moment + part * d))
    spread = (tl.log2(total) - tl.sum(moment, axis=0) / total) * _LN_2
    tl.store(log_norm + row, top * inverse + tl.log2(total) * _LN_2)
    tl.store(entropy + row, tl.where(spread < 0.0, 0.0, spread))
    for start in range(0, blocks, LOOP):
        block = start + tl.arange(0, LOOP)
        here = row * blocks + block
        d_block = (tl.load(block_max + here, mask=block < blocks, other=0.0) - top) * scale
        mass = tl.load(block_mass + here, mask=block < blocks, other=0.0) / total
        tl.store(block_mass + here, tl.exp2(d_block) * mass, mask=block < blocks)


@triton.jit
def _load(logits, ids, vocabulary, inverse, UNUSED: tl.constexpr):
    """Some logits of a row, -inf beyond its end, and integers in their order; -0 ties with 0.

    Dividing by the temperature keeps the numbers of a shorter dtype apart, and may make float32
    numbers equal: only these are divided before they are put in order.
    """
    loaded = tl.load(logits + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    x = loaded * inverse
    ordered = x if UNUSED == 0 else loaded
    bits = tl.where(ordered == 0.0, 0, ordered.to(tl.int32, bitcast=True))
    return x, (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED


@triton.jit
def _read(
    logits,
    stride,
    vocabulary,
    inverse,
    log_norm,
    rows,
    wanted,
    entropy,
    size,
    mass,
    tail_mass,
    threshold,
    last,
    NUCLEUS: tl.constexpr,
    SEARCH: tl.constexpr,
    UNUSED: tl.constexpr,
    LOOP: tl.constexpr,
):
    """The region of one row: what lies at or above its threshold, or above its edge.

    The edge is the largest key such that the tokens at or above it are enough.
    """
    row = tl.load(rows + tl.program_id(0))
    logits += row * stride
    norm = tl.load(log_norm + row)
    goal = tl.load(wanted)
    above = goal * 0.0  # mass, or tokens, known to lie above the region's smallest logit
    low = tl.full((), -(1 << (31 - UNUSED)), tl.int64)
    LEVELS: tl.constexpr = (32 - UNUSED + 3) // 4 if SEARCH else 0
    SPAN: tl.constexpr = 16 * LOOP
    for level in range(LEVELS):
        shift = 4 * (LEVELS - 1 - level)
        edges = (low + (tl.arange(0, 16).to(tl.int64) << shift)).to(tl.int32)
        reached = tl.zeros((16,), tl.float64)
        for span in range(0, vocabulary, SPAN):
            # A lane adds up no more than 16 tokens in float32, which would round many too far.
            held = tl.zeros((16, LOOP), tl.float32)
            for start in range(span, tl.minimum(span + SPAN, vocabulary), LOOP):
                x, key = _load(logits, start + tl.arange(0, LOOP), vocabulary, inverse, UNUSED)
                weight = tl.exp(x - norm) if NUCLEUS else (x > float("-inf")).to(tl.float32)
                held += tl.where(key[None, :] >= edges[:, None], weight[None, :], 0.0)
            reached += tl.sum(held.to(tl.float64), axis=1)
        every = tl.max(reached, axis=0)  # at first all there is, 1 but for rounding
        first_goal = goal * every if NUCLEUS else tl.minimum(goal, every)
        goal = tl.where(level == 0, first_goal, goal)
        enough = reached >= goal
        low += (tl.sum(enough.to(tl.int32), axis=0) - 1).to(tl.int64) << shift
        above = tl.maximum(above, tl.max(tl.where(enough, 0.0, reached), axis=0))

    key_edge = low.to(tl.int32)
    bits = key_edge << UNUSED
    bits = tl.where(bits < 0, bits | ((1 << UNUSED) - 1), bits)
    edge = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    if UNUSED != 0:
        edge = edge * inverse
    if not SEARCH:
        edge = tl.load(threshold + row)
    p_edge = tl.exp(edge - norm)
    weight_edge = p_edge.to(tl.float64) if NUCLEUS else goal * 0.0 + 1.0
    # Tokens at the edge weigh the same, so that their mass tells how many have a place.
    places = tl.minimum(tl.maximum(tl.ceil((goal - above) / weight_edge), 1.0), vocabulary)
    places = places.to(tl.int32)

    tied = tl.zeros((), tl.int32)
    end = tl.full((LOOP,), -1, tl.int32)
    over = tl.zeros((LOOP,), tl.int32)
    mass_over = tl.zeros((LOOP,), tl.float32)
    mass_under = tl.zeros((LOOP,), tl.float32)
    moment = tl.zeros((LOOP,), tl.float32)
    for start in range(0, vocabulary, LOOP):
        ids = start + tl.arange(0, LOOP)
        x, key = _load(logits, ids, vocabulary, inverse, UNUSED)
        p = tl.exp(x - norm)
        if SEARCH:
            inside = key > key_edge
            outside = key < key_edge
        else:  # no token waits for a place
            inside = x >= edge
            outside = x < edge
        over += inside.to(tl.int32)
        mass_over += tl.where(inside, p, 0.0)
        mass_under += tl.where(outside, p, 0.0)
        moment += tl.where(inside, p * (x - norm), 0.0)
        ties = (inside == outside).to(tl.int32)
        place = tied + tl.cumsum(ties, axis=0)
        end = tl.maximum(end, tl.where((ties > 0) & (place == places), ids, -1))
        tied += tl.sum(ties, axis=0)

    places = tl.minimum(places, tied)
    p_in = p_edge.to(tl.float64) * places
    p_out = p_edge.to(tl.float64) * (tied - places)
    held_in = tl.sum(mass_over.to(tl.float64), axis=0) + p_in
    held_out = tl.sum(mass_under.to(tl.float64), axis=0) + p_out
    total = held_in + held_out  # 1 but for rounding
    # q, the softmax over the region, is p / held_in.
    held_moment = tl.sum(moment.to(tl.float64), axis=0) + p_in * (edge - norm)
    spread = tl.log(held_in.to(tl.float32)) - (held_moment / held_in).to(tl.float32)
    last_id = tl.where(places < tied, tl.max(end, axis=0), vocabulary - 1)
    tl.store(entropy + row, tl.where(spread < 0.0, 0.0, spread))
    tl.store(size + row, (tl.sum(over, axis=0) + places).to(tl.int64))
    tl.store(mass + row, (held_in / total).to(tl.float32))
    tl.store(tail_mass + row, (held_out / total).to(tl.float32))
    tl.store(threshold + row, edge)
    tl.store(last + row, last_id.to(tl.int64))


@triton.jit
def _product(
    x,
    ids,
    row,
    log_norm,
    factor,
    threshold,
    last,
    slope,
    level,
    WIDE: tl.constexpr,
):
    """p_j * f_j at some tokens of a row."""
    full = tl.zeros_like(x) + tl.load(factor + row)
    for i in tl.static_range(WIDE):
        at = row * WIDE + i
        edge = tl.load(threshold + at)
        inside = (x > edge) | ((x == edge) & (ids <= tl.load(last + at).to(tl.int32)))
        piece = tl.load(slope + at) * (x + tl.load(level + at))
        full += tl.where(inside & (x > float("-inf")), piece, 0.0)
    return tl.exp(x - tl.load(log_norm + row)) * full


@triton.jit
def _sums_at_ids(
    logits,
    stride,
    inverse,
    log_norm,
    factor,
    threshold,
    last,
    slope,
    level,
    ids,
    at_ids,
    listed,
    chunks,
    sums,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradient at the listed tokens, with all additions to a token summed in one step."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    place = (program % chunks) * CHUNK + tl.arange(0, CHUNK)
    mine = tl.load(ids + row * listed + place, mask=place < listed, other=0).to(tl.int32)
    added = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, listed, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(ids + row * listed + other, mask=other < listed, other=-1).to(tl.int32)
        values = tl.load(at_ids + row * listed + other, mask=other < listed, other=0.0)
        same = mine[:, None] == theirs[None, :]
        added += tl.sum(tl.where(same, values[None, :], 0.0), axis=1)
    x = tl.load(logits + row * stride + mine).to(tl.float32) * inverse
    product = _product(x, mine, row, log_norm, factor, threshold, last, slope, level, WIDE)
    result = (product + added).to(sums.dtype.element_ty)
    tl.store(sums + row * listed + place, result, mask=place < listed)


@triton.jit
def _products(
    logits,
    stride,
    inverse,
    log_norm,
    factor,
    threshold,
    last,
    slope,
    level,
    vocabulary,
    tiles,
    out,
    out_stride,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """p_j * f_j of one tile of a row."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    ids = (program % tiles) * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + ids, mask=ids < vocabulary, other=0.0)
    x = x.to(tl.float32) * inverse
    result = _product(x, ids, row, log_norm, factor, threshold, last, slope, level, WIDE)
    tl.store(out + row * out_stride + ids, result.to(out.dtype.element_ty), mask=ids < vocabulary)
