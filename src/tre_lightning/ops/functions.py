r"""Log-probability of the labels and entropy of each position, with their analytic gradient.

Exact, like :mod:`tre_lightning.entropy`, but the logits are read once forward and once backward,
and the fused forms never hold more than a chunk of them. bf16 and fp16 logits are computed with in
float32. A row with NaN, or with nothing but -inf, gives NaN (and ``region_size`` 0); a label at
-inf has log-probability -inf.

The forms that start from hidden states multiply by the weight of the language model's head chunk by
chunk. :func:`fused_linear_logprobs_and_entropy` does it again backward: 4 matrix products where the
head alone needs 3. :func:`fused_linear_loss` takes the loss as a function, so that a chunk's
gradient is known while its logits are still there: 3 products (as the fused linear losses of Liger
Kernel, arXiv 2410.10989).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tre_lightning.entropy import EntropyStats, Region
from tre_lightning.ops.region import RegionRows
from tre_lightning.ops.scan import Scan, d_logits, scan

MEMORY = 128 * 2**20  # bytes of logits that the fused forms hold at a time, unless told otherwise
_ROWS = 64  # a chunk is a multiple of this where it can be: matrix products like it
_PIECE = 2**22  # elements of a 16-bit weight gradient that are made at a time on a CPU


class LogprobsAndEntropy(NamedTuple):
    """What the ops return, each of the shape of the labels."""

    logprobs: Tensor  # log-probability of the label; differentiable
    entropy: Tensor  # of the region, times log|V| / log|A| (0 where |A| = 1), nats; differentiable
    full_entropy: Tensor  # over the whole vocabulary, nats; no gradient
    region_size: Tensor  # |A|, tokens (int64); |V| where no region is given
    tail_mass: Tensor  # probability outside the region; no gradient


@dataclass(frozen=True)
class PolicyOutputs:
    """What a policy says of tokens, n response tokens in all, padding left out."""

    logprobs: Tensor  # [n] float32 (float64 of float64 logits), of the tokens; differentiable
    entropies: Mapping[Region, EntropyStats]  # [n] each, of the regions that were asked for
    logits: Tensor | None = None  # [n, V], temperature applied, where they were asked for

    def entropy(self, region: Region) -> EntropyStats:
        """Entropies and region of each token; ``region`` and ``scaled`` are differentiable.

        Raises:
            ValueError: if no method's ``regions`` names this region.
        """
        if region not in self.entropies:
            raise ValueError(f"{region} is not at hand; name it in the method's `regions`")
        return self.entropies[region]


class LossSum(NamedTuple):
    """What :func:`fused_linear_loss` returns."""

    total: Tensor  # scalar, differentiable
    losses: Tensor  # [..., N], what the loss function returned, no gradient
    logprobs: Tensor  # [N], no gradient


Loss = Callable[[slice, PolicyOutputs], Tensor]


def logprobs_and_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: float = 1.0,
    reuse_logits: bool = False,
) -> LogprobsAndEntropy:
    """Log-probability of the labels and entropy of the region, from logits.

    Args:
        logits: ``[..., V]``, any float dtype.
        labels: ``[...]`` token ids.
        top_k: the region is this many most probable tokens.
        top_p: the region is the smallest nucleus of this mass.
        min_p: the region is the tokens at least this many times as probable as the most probable
            one; without any of the three it is the vocabulary.
        temperature: the logits are divided by it.
        reuse_logits: the backward pass overwrites the logits with their gradient instead of
            allocating one; only where nothing else needs them, and for one backward pass.

    Raises:
        ValueError: for shapes, labels, region or temperature that cannot be.
    """
    region = Region(top_k, top_p, min_p)
    stats = token_stats(logits, labels, [region], temperature, reuse_logits=reuse_logits)
    return _named(stats, region)


def fused_linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: float = 1.0,
    memory: int = MEMORY,
) -> LogprobsAndEntropy:
    """The same of ``hidden @ weight.T + bias``, of which only a chunk exists at a time.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]``, of the dtype of hidden.
        labels: ``[...]`` token ids.
        bias: ``[V]``.
        top_k: as in :func:`logprobs_and_entropy`.
        top_p: as in :func:`logprobs_and_entropy`.
        min_p: as in :func:`logprobs_and_entropy`.
        temperature: as in :func:`logprobs_and_entropy`.
        memory: bytes of logits held at a time.

    Raises:
        ValueError: for shapes, dtypes, labels, region, temperature or memory that cannot be.

    Example:
        >>> hidden, head = torch.zeros(2, 5, 8), torch.zeros(100, 8)  # [B, T, D], [V, D]
        >>> labels = torch.zeros(2, 5, dtype=torch.int64)
        >>> out = fused_linear_logprobs_and_entropy(hidden, head, labels, top_k=2)
        >>> out.entropy[0, 0]  # a uniform region scores log 100, whatever its size
        tensor(4.6052)
    """
    region = Region(top_k, top_p, min_p)
    stats = fused_linear_token_stats(
        hidden, weight, labels, [region], bias=bias, temperature=temperature, memory=memory
    )
    return _named(stats, region)


def token_stats(
    logits: Tensor,
    labels: Tensor,
    regions: Sequence[Region],
    temperature: float = 1.0,
    *,
    reuse_logits: bool = False,
) -> PolicyOutputs:
    """:func:`logprobs_and_entropy` for any number of regions, in one look at the logits."""
    _check(logits.shape, logits.shape[-1] if logits.dim() else 0, labels, temperature)
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    values = _apply(_FromLogits, flat, labels.reshape(-1), regions, temperature, reuse_logits)
    return _stats(values, regions, logits.shape[-1], labels.shape)


def fused_linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    regions: Sequence[Region],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    memory: int = MEMORY,
) -> PolicyOutputs:
    """:func:`fused_linear_logprobs_and_entropy` for any number of regions."""
    hidden, weight, bias = _operands(hidden, weight, labels, bias, temperature, memory)
    values = _apply(
        _FusedLinear, hidden, weight, bias, labels.reshape(-1), regions, temperature, memory
    )
    return _stats(values, regions, len(weight), labels.shape)


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: Loss,
    regions: Sequence[Region],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    memory: int = MEMORY,
) -> LossSum:
    """Sum of a loss of every token, whose gradient is taken while the chunk's logits are there.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``, of the dtype of hidden.
        labels: ``[N]`` token ids.
        loss: takes the rows of a chunk and their statistics, and returns losses ``[..., n]``; the
            gradient flows through the statistics alone.
        regions: those whose entropies the loss needs.
        bias: ``[V]``.
        temperature: the logits are divided by it.
        memory: bytes of logits held at a time.

    Raises:
        ValueError: as :func:`fused_linear_logprobs_and_entropy`.
    """
    hidden, weight, bias = _operands(hidden, weight, labels, bias, temperature, memory)
    wanted = torch.is_grad_enabled()  # within the function it never is
    operands = (hidden, weight, bias, labels.reshape(-1))
    values = _apply(_FusedLinearLoss, *operands, loss, regions, temperature, memory, wanted)
    return LossSum(*values)


def _apply(function: Any, *args: Any) -> tuple[Tensor, ...]:
    values: tuple[Tensor, ...] = function.apply(*args)
    return values


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        regions: Sequence[Region],
        temperature: float,
        reuse: bool,
    ) -> tuple[Tensor, ...]:
        result = scan(logits, labels, regions, temperature)
        ctx.save_for_backward(logits, labels, *_flat(result))
        ctx.temperature, ctx.reuse, ctx.spent = temperature, reuse, False
        return _outputs(ctx, result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("reuse_logits=True overwrote the logits; it allows one backward")
        logits, labels, *rest = ctx.saved_tensors
        out = logits.detach() if ctx.reuse else torch.empty_like(logits)
        ctx.spent = ctx.reuse
        d_logits(logits, labels, _unflat(rest), *_by_output(grads), ctx.temperature, out)
        return out, None, None, None, None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        regions: Sequence[Region],
        temperature: float,
        memory: int,
    ) -> tuple[Tensor, ...]:
        with _plain(hidden):
            scans = [
                scan(logits, labels[rows], regions, temperature)
                for rows, logits in _chunks(hidden, weight, bias, memory)
            ]
        result = _cat(scans)
        ctx.save_for_backward(hidden, weight, bias, labels, *_flat(result))
        ctx.temperature, ctx.memory = temperature, memory
        return _outputs(ctx, result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, *rest = ctx.saved_tensors
        result, (d_logprobs, d_entropies) = _unflat(rest), _by_output(grads)
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad, ctx.memory)
        with _plain(hidden):
            for rows, logits in _chunks(hidden, weight, bias, ctx.memory):
                part = Scan(*(_rows(field, rows) for field in result))
                d_logprob, d_entropy = _rows(d_logprobs, rows), _rows(d_entropies, rows)
                d_logits(logits, labels[rows], part, d_logprob, d_entropy, ctx.temperature, logits)
                sums.add(rows, logits)
        return *sums.sums(), None, None, None, None


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss: Loss,
        regions: Sequence[Region],
        temperature: float,
        memory: int,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        needed = [grad and need for need in ctx.needs_input_grad]
        sums = _Gradients(hidden, weight, bias, needed, memory)
        losses, logprobs = [], []
        for rows, logits in _chunks(hidden, weight, bias, memory):
            with _plain(hidden):
                result = scan(logits, labels[rows], regions, temperature)
            with torch.enable_grad():
                values = _values(result)
                leaves = [values[0], *values[2::3]]
                for leaf in leaves:
                    leaf.requires_grad_()
                chunk = loss(rows, _stats(values, regions, len(weight), labels[rows].shape))
                total = chunk.sum()
            losses.append(chunk.detach())
            logprobs.append(result.logprobs)
            if any(needed):
                d = torch.autograd.grad(total, leaves, allow_unused=True)
                with _plain(hidden):
                    d_logits(logits, labels[rows], result, d[0], d[1:], temperature, logits)
                    sums.add(rows, logits)
        ctx.sums, ctx.spent = sums.sums(), False
        all_losses, all_logprobs = torch.cat(losses, -1), torch.cat(logprobs)
        ctx.mark_non_differentiable(all_losses, all_logprobs)
        return all_losses.sum(), all_losses, all_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("fused_linear_loss gives its gradient once; call it again")
        grads, ctx.sums, ctx.spent = ctx.sums, None, True
        return *(None if grad is None else grad.mul_(d_total) for grad in grads), *[None] * 6


class _Gradients:
    """Gradients of the head's operands, added up chunk by chunk, from row 0 on.

    Where there are several chunks, 16-bit weights have theirs added up in float32.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: Sequence[bool],
        memory: int,
    ) -> None:
        several = _chunk_rows(hidden, weight, memory) < len(hidden)
        wide = torch.float32 if several and weight.itemsize < 4 else weight.dtype
        self._operands = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self._weight = torch.empty_like(weight, dtype=wide) if needed[1] else None
        needs_bias = needed[2] and bias is not None
        self._bias = weight.new_zeros(len(weight), dtype=wide) if needs_bias else None

    def add(self, rows: slice, d: Tensor) -> None:
        """Add what the gradient of some rows' logits, ``[n, V]``, brings."""
        hidden, weight = self._operands
        if self.hidden is not None:
            torch.mm(d, weight, out=self.hidden[rows])
        if self._weight is not None:
            # Filling it with zeros first would cost about as much as the product.
            _add_product(self._weight, d.T, hidden[rows], keep=rows.start > 0)
        if self._bias is not None:
            self._bias += d.sum(0, dtype=self._bias.dtype)

    def sums(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, in the operands' dtype; None where none is needed."""
        dtype = self._operands[1].dtype
        parts = [None if part is None else part.to(dtype) for part in (self._weight, self._bias)]
        return self.hidden, parts[0], parts[1]


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
    """``out += a @ b``, or ``out = a @ b`` unless ``keep``; out may have another dtype."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=float(keep))
        return
    height, width = out.shape
    # On a CPU in pieces that stay in its cache until they are added.
    size = height if out.is_cuda else max(1, min(height, _PIECE // max(width, 1)))
    piece = b.new_empty(size, width)
    for start in range(0, height, size):
        part = slice(start, min(start + size, height))
        product = torch.mm(a[part], b, out=piece[: part.stop - start])
        if keep:
            out[part] += product
        else:
            out[part] = product


def _chunk_rows(hidden: Tensor, weight: Tensor, memory: int) -> int:
    """Rows of a chunk."""
    size = max(1, memory // (len(weight) * hidden.element_size()))
    return min(size - size % _ROWS if size > _ROWS else size, len(hidden))


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: int) -> Any:
    """Rows and their logits ``[n, V]``, all in one buffer."""
    count, vocabulary = len(hidden), len(weight)
    size = _chunk_rows(hidden, weight, memory)
    buffer = hidden.new_empty(size, vocabulary)
    for start in range(0, max(count, 1), max(size, 1)):  # one chunk without rows if there are none
        rows = slice(start, min(start + size, count))
        logits = buffer[: rows.stop - start]
        if bias is None:
            torch.mm(hidden[rows], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.T, out=logits)
        yield rows, logits


def _operands(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    memory: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype, the hidden states as ``[N, D]``; checked."""
    _check(hidden.shape, len(weight) if weight.dim() else 0, labels, temperature)
    if memory < 1:
        raise ValueError(f"memory={memory} must be at least 1 byte of logits")
    width = (weight.shape[1],) if weight.dim() == 2 else ()
    if weight.dim() != 2 or hidden.shape[-1:] != width:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit; give "
            "[..., D] and [V, D]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} must be [{len(weight)}], one a token of weight")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype} and weight {weight.dtype}; cast one of them")
    device = hidden.device.type
    parts: list[Tensor | None] = [hidden.reshape(-1, hidden.shape[-1]), weight, bias]
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        parts = [None if part is None else part.to(dtype) for part in parts]
    flat, head, bias = parts
    assert flat is not None and head is not None
    if flat.dtype != head.dtype:
        raise ValueError(f"hidden is {flat.dtype} and weight {head.dtype}; cast one of them")
    return flat, head, bias


def _check(shape: torch.Size, vocabulary: int, labels: Tensor, temperature: float) -> None:
    """Raise ValueError for what would give wrong numbers or an obscure error."""
    if not shape or not vocabulary:
        raise ValueError(f"logits or hidden states of shape {list(shape)} have no token axis")
    if shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {list(labels.shape)} must have the shape of the positions, {list(shape[:-1])}"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels are {labels.dtype}; give token ids as int64")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= vocabulary):
        raise ValueError(
            f"labels lie between {int(labels.min())} and {int(labels.max())}; the vocabulary has "
            f"ids 0 to {vocabulary - 1}: leave out padding such as -100 beforehand"
        )


def _plain(like: Tensor) -> torch.autocast:
    """Without autocast: every dtype here is chosen."""
    return torch.autocast(like.device.type, enabled=False)


# ----- results as the flat tuples that autograd takes


def _outputs(ctx: Any, result: Scan) -> tuple[Tensor, ...]:
    ctx.set_materialize_grads(False)
    values = _values(result)
    differentiable = (values[0], *values[2::3])
    constants = [value for value in values if all(value is not one for one in differentiable)]
    ctx.mark_non_differentiable(*constants)
    return tuple(values)


def _values(result: Scan) -> list[Tensor]:
    """Log-probabilities, full entropy, then entropy, size and tail mass of every region."""
    parts = [part for r in result.regions for part in (r.entropy, r.size, r.tail_mass)]
    return [part.detach() for part in (result.logprobs, result.full_entropy, *parts)]


def _by_output(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of the log-probabilities and of each region's entropy."""
    return grads[0], tuple(grads[2::3])


def _stats(
    values: Sequence[Tensor], regions: Sequence[Region], vocabulary: int, shape: torch.Size
) -> PolicyOutputs:
    logprobs, full, *rest = (value.view(shape) for value in values)
    entropies = {}
    for number, region in enumerate(regions):
        entropy, size, tail_mass = rest[3 * number : 3 * number + 3]
        scale = torch.ones_like(entropy)
        if not region.whole:
            log_size = size.clamp(min=2).to(entropy.dtype).log()
            scale = torch.where(size > 1, math.log(vocabulary) / log_size, 0.0)
        entropies[region] = EntropyStats(full, entropy, entropy * scale, scale, size, tail_mass)
    return PolicyOutputs(logprobs, entropies)


def _named(stats: PolicyOutputs, region: Region) -> LogprobsAndEntropy:
    found = stats.entropies[region]
    return LogprobsAndEntropy(stats.logprobs, found.scaled, found.full, found.size, found.tail_mass)


def _flat(result: Scan) -> list[Tensor]:
    parts = [part for region in result.regions for part in region]
    return [result.logprobs, result.log_norm, result.full_entropy, *parts]


def _unflat(parts: Sequence[Tensor]) -> Scan:
    fields = len(RegionRows._fields)
    starts = range(3, len(parts), fields)
    regions = tuple(RegionRows(*parts[start : start + fields]) for start in starts)
    return Scan(parts[0], parts[1], parts[2], regions)


def _rows(value: Any, rows: slice) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, RegionRows):
        return value.rows(rows)
    return tuple(_rows(part, rows) for part in value)


def _cat(scans: Sequence[Scan]) -> Scan:
    return _unflat([torch.cat(column) for column in zip(*map(_flat, scans), strict=True)])
