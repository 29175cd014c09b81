"""prompts -> rollout: batched sampling with a key-value cache.

Every sampled token consumes one uniform number that belongs to its row, so responses do not depend
on how rows are laid out over batches and devices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass  # not frozen: Lightning copies a batch field by field to convert its precision
class PromptBatch:
    """Prompts of this rank, and what the task needs to score the responses to them.

    ``first_row`` and ``total_rows`` place them in the global batch: this rank holds prompts
    ``first_row`` to ``first_row + B - 1`` of ``total_rows``. ``split`` and ``index`` say which
    batch it is (train and the iteration, val and its number); all randomness of its responses
    derives from them.
    """

    prompt_ids: Tensor  # [B, P] int64, padded on the left
    prompt_mask: Tensor  # [B, P] bool, True = a real token
    texts: tuple[str, ...]  # B prompts as text
    extras: tuple[Mapping[str, Any], ...]  # B mappings for the scorer (gold answer, numbers, ...)
    split: str
    index: int
    first_row: int
    total_rows: int

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device, **kwargs: Any) -> "PromptBatch":
        """The same on a device; what Lightning calls to move a batch."""
        ids, mask = self.prompt_ids.to(device, **kwargs), self.prompt_mask.to(device, **kwargs)
        return replace(self, prompt_ids=ids, prompt_mask=mask)


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Row ``i * n + j`` is the j-th response to prompt i."""

    prompt_ids: Tensor  # [B, P] int64, padded on the left
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, T] int64, padded on the right
    response_mask: Tensor  # [B, T] bool, True = sampled, the end-of-sequence token included
    finished: Tensor  # [B] bool, True = ended by itself, not cut at max_new_tokens

    def __len__(self) -> int:
        return len(self.response_ids)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return self.map(lambda _, tensor: tensor[rows])

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """A new batch of this kind whose tensors are ``change(name, tensor)``.

        The tensors of a mapping are named ``field/key``.
        """
        changed: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                changed[name] = {k: change(f"{name}/{k}", v) for k, v in value.items()}
            elif value is not None:
                changed[name] = change(name, value)
        return replace(self, **changed)


def pick_tokens(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> Tensor:
    """Sample by inverting the cumulative distribution, ``[B, V], [B] -> [B]``.

    ``top_p`` < 1 samples from the smallest nucleus that reaches it (crossing token included).
    """
    probs = logits.float().softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.where(before < top_p, 0.0))
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    point = uniform.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, point, right=True)
        .squeeze(-1)
        .clamp_(max=probs.shape[-1] - 1)
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    num_responses: int,
    uniforms: Tensor,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollout:
    """Sample ``num_responses`` responses to every prompt.

    Args:
        model: a causal language model.
        prompts: B prompts.
        num_responses: responses a prompt (n).
        uniforms: ``[B * n, max_new_tokens]`` numbers in [0, 1), one a token.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills the response after its end.
        temperature: divides the logits, > 0.
        top_p: nucleus to sample from; 1.0 samples from the whole distribution.
    """
    device = prompts.prompt_ids.device
    rows, max_new_tokens = uniforms.shape
    if rows != len(prompts) * num_responses:
        raise ValueError(f"uniforms has {rows} rows, not {len(prompts)} prompts x {num_responses}")
    uniforms = uniforms.to(device)
    eos = torch.tensor(list(eos_token_ids), device=device)

    with _eval_mode(model):
        cache = DynamicCache(config=model.config)
        mask = prompts.prompt_mask
        logits = model(
            input_ids=prompts.prompt_ids,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        # One pass over each prompt serves all its responses.
        cache.batch_repeat_interleave(num_responses)
        logits = logits.repeat_interleave(num_responses, 0)
        mask = mask.repeat_interleave(num_responses, 0)
        next_position = mask.sum(-1, keepdim=True)

        response = torch.full((rows, max_new_tokens), pad_token_id, device=device)
        response_mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
        running = torch.ones(rows, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            token = pick_tokens(logits / temperature, uniforms[:, t], top_p)
            response[:, t] = token.where(running, pad_token_id)
            response_mask[:, t] = running
            running = running & ~torch.isin(token, eos)
            if t + 1 == max_new_tokens or not running.any():
                break
            mask = torch.cat([mask, response_mask[:, t : t + 1]], dim=1)
            logits = model(
                input_ids=response[:, t : t + 1],
                attention_mask=mask.long(),
                position_ids=next_position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            next_position = next_position + 1
    longest = int(response_mask.any(0).sum())
    return Rollout(
        prompt_ids=prompts.prompt_ids.repeat_interleave(num_responses, 0),
        prompt_mask=prompts.prompt_mask.repeat_interleave(num_responses, 0),
        response_ids=response[:, :longest],
        response_mask=response_mask[:, :longest],
        finished=~running,
    )


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """In training mode, layers that checkpoint their gradients drop the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def positions(mask: Tensor) -> Tensor:
    """Position ids of a left-padded batch, ``[B, T] bool -> [B, T] int64``; padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
