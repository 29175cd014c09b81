"""Batches and tokens written out by hand, for the tests of the methods."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tre_lightning.batches import TrainingBatch
from tre_lightning.methods import Tokens

Rows = Sequence[Sequence[float]]


def padded(rows: Rows, padding: float = 0.0) -> Tensor:
    """Rows of any lengths as ``[B, T]``."""
    parts = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return pad_sequence(parts, batch_first=True, padding_value=padding)


def training_batch(
    advantages: Rows,
    old_logprobs: Rows | None = None,
    observed: Mapping[str, Rows] | None = None,
    scores: Sequence[float] | None = None,
) -> TrainingBatch:
    """One response a row; what stands at its padding is NaN, as no hook may look there."""
    mask = padded([[1.0] * len(row) for row in advantages]).bool()
    nan = float("nan")
    zeros = torch.zeros(mask.shape)
    return TrainingBatch(
        prompt_ids=torch.ones(len(mask), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(mask), 1, dtype=torch.bool),
        response_ids=mask.long(),
        response_mask=mask,
        finished=torch.ones(len(mask), dtype=torch.bool),
        scores=torch.zeros(len(mask)) if scores is None else torch.tensor(scores),
        old_logprobs=zeros if old_logprobs is None else padded(old_logprobs, nan),
        ref_logprobs=None,
        values=zeros,
        observed={name: padded(rows, nan) for name, rows in (observed or {}).items()},
        rewards=zeros,
        advantages=padded(advantages, nan),
        returns=zeros,
    )


def tokens(
    n: int,
    old_logprobs: Sequence[float] | None = None,
    advantages: Sequence[float] | None = None,
    observed: Mapping[str, Tensor] | None = None,
) -> Tokens:
    """``n`` tokens of one response."""
    return Tokens(
        old_logprobs=torch.zeros(n) if old_logprobs is None else torch.tensor(old_logprobs),
        advantages=torch.zeros(n) if advantages is None else torch.tensor(advantages),
        positions=torch.arange(n),
        observed=observed or {},
    )
