"""The interface of rollout engines, and helpers that they have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tre_lightning.batches import PromptBatch, Rollout

Recorder = Callable[[Tensor, int, Tensor, Tensor], None]
"""Is told of a step: rows ``[m]`` of the rollout, the position in their responses, the tokens drawn
``[m]``, and the logits ``[m, V]`` that they were drawn from, before the temperature."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one call: how responses are sampled.

    Args:
        num_responses: responses a prompt (n).
        max_new_tokens: longest response, tokens.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills the response after its end.
        seed: of the run; the random numbers of a response derive from it, the batch and the row.
        temperature: divides the logits, > 0.
        top_p: nucleus to sample from; 1.0 samples from the whole distribution.
        sample_batch_size: responses sampled at a time; None = all.
        record: is told of every token; by the engine ``in_process`` alone, others have no logits.
    """

    num_responses: int
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    pad_token_id: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    sample_batch_size: int | None = None
    record: Recorder | None = None


class RolloutEngine(Protocol):
    """A sampler of responses; it may keep its set-up between calls."""

    def sample(self, model: PreTrainedModel, prompts: PromptBatch, how: Sampling) -> Rollout:
        """Responses to B prompts by the model as it is now, ``[B * n, T]``.

        Row ``i * n + j`` is the j-th response to prompt i. ``behaviour_logprobs`` are those of the
        distribution that the engine sampled from: the whole vocabulary at the temperature (and,
        where ``top_p`` < 1, an engine may give those of the nucleus).
        """


def prompt_tokens(prompts: PromptBatch) -> list[list[int]]:
    """Ids of each prompt, without padding."""
    rows = zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def rollout_of(
    prompts: PromptBatch,
    how: Sampling,
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
) -> Rollout:
    """Join prompts with ``B * n`` responses of token ids, end included, and log-probabilities."""
    device = prompts.prompt_ids.device
    ends = set(how.eos_token_ids)
    longest = max(map(len, responses))
    length = torch.tensor([len(response) for response in responses])

    def padded(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        wide = [[*row, *[fill] * (longest - len(row))] for row in rows]
        return torch.tensor(wide, dtype=dtype, device=device)

    return Rollout(
        prompt_ids=prompts.prompt_ids.repeat_interleave(how.num_responses, 0),
        prompt_mask=prompts.prompt_mask.repeat_interleave(how.num_responses, 0),
        response_ids=padded(responses, how.pad_token_id, torch.int64),
        response_mask=(torch.arange(longest) < length.unsqueeze(1)).to(device),
        finished=torch.tensor([response[-1] in ends for response in responses], device=device),
        behaviour_logprobs=padded(logprobs, 0.0, torch.float32),
    )
