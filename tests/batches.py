"""Batches, tokens and outputs written out by hand, for the tests of the methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tre_lightning.batches import PromptBatch, Rollout, TrainingBatch
from tre_lightning.methods import LossTerm, Method, PolicyOutputs, Tokens
from tre_lightning.methods.hooks import weighed
from tre_lightning.ops import Region
from tre_lightning.policy.head import HeadOptions, head_outputs

Rows = Sequence[Sequence[float]]


def prompt_batch(
    *extras: Mapping[str, Any], texts: Sequence[str] | None = None, split: str = "train"
) -> PromptBatch:
    """Prompts of one token each, with what a scorer is told of them."""
    rows = len(extras)
    ids = torch.ones(rows, 1, dtype=torch.long)
    return PromptBatch(ids, ids.bool(), tuple(texts or [""] * rows), extras, split, 0, 0, rows)


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


def without(batch: TrainingBatch, *unscored: int) -> TrainingBatch:
    """The batch when these responses could not be scored; of no number: none could."""
    mask = batch.response_mask.clone()
    mask[list(unscored) or slice(None)] = False
    return replace(batch, response_mask=mask)


def entropy(*weights: float) -> float:
    """Of these weights once they add up to 1, nats."""
    q = [w / sum(weights) for w in weights]
    return -sum(p * math.log(p) for p in q)


def outputs(method: Method, logits: Tensor, *others: Region, fused: bool = True) -> PolicyOutputs:
    """What a method is given of tokens ``[n]`` that have these logits ``[n, V]``."""
    regions = (*method.regions, *method.observed_regions, *others)
    show = method.needs_logits
    asked = HeadOptions(regions, temperature=1.0, memory=1, fused=fused, show_logits=show)
    return head_outputs(logits, None, torch.zeros(len(logits), dtype=torch.long), asked)


def mean_loss(term: LossTerm, logits: Tensor, batch: TrainingBatch) -> Tensor:
    """The term as the module adds it to the loss of a batch of one row."""
    weights = weighed(batch, [term], (0,)).weights[term.name][batch.response_mask]
    losses = term.per_token(outputs(term, logits), tokens(0))
    return term.coef_at(0) * (weights * losses).sum() / len(losses)


def one_response(ids: Tensor, length: int, mask: Tensor | None = None) -> Rollout:
    """The last ``length`` of these tokens ``[B, C]`` as the responses to the others."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    asked, said = slice(None, -length), slice(-length, None)
    counted = mask[:, said]
    return Rollout(ids[:, asked], mask[:, asked], ids[:, said], counted, counted[:, 0])


LOGPROBS_ALONE = HeadOptions(regions=(), temperature=1.0, memory=2**20)
