"""The data of one iteration: prompts, rollout, experience, training batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from tre_lightning.common.distributed import gather_rows


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
    questions: tuple[str, ...] = ()  # the same B prompts without what a chat template adds

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device, **kwargs: Any) -> "PromptBatch":
        """A copy on another device; Lightning calls this to move a batch."""
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
    # [B, T] float32, of the sampled tokens by what sampled them, at its temperature
    behaviour_logprobs: Tensor | None = field(default=None, kw_only=True)

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

    def lengths(self) -> tuple[list[int], list[int]]:
        """Columns that each row's prompt and response take in a pass, B numbers each."""
        # A fully masked response still needs a column for the model to run on.
        last = self.response_mask.long().cumsum(1).argmax(1) + 1
        return self.prompt_mask.sum(1).tolist(), last.tolist()

    def prompts(self) -> list[int]:
        """A number for each row's prompt, equal where prompts are."""
        if not len(self):
            return []
        shown = self.prompt_ids.where(self.prompt_mask, -1)
        found: list[int] = shown.unique(dim=0, return_inverse=True)[1].tolist()
        return found

    def trimmed(self) -> Self:
        """Without the columns that are padding in every row."""
        prompt, response = map(max, self.lengths())

        def cut(name: str, rows: Tensor) -> Tensor:
            if rows.dim() == 1:
                return rows
            return rows[:, -prompt:] if name.startswith("prompt_") else rows[:, :response]

        return self.map(cut)

    def uncounted(self) -> Self:
        """A copy in which no token counts."""
        return replace(self, response_mask=torch.zeros_like(self.response_mask))

    def padding(self, *, packed: bool = False) -> Tensor:
        """Which columns of a pass over these rows are wasted, ``[B, P + T]`` bool.

        All of a row of which no token counts; none where rows are computed ``packed``.
        """
        used = self.response_mask.any(1, keepdim=True)
        wasted = ~torch.cat([self.prompt_mask & used, self.response_mask], dim=1)
        return wasted & ~(used.any() & packed)


@dataclass(frozen=True)
class Experience(Rollout):
    """A scored rollout under the policy that sampled it.

    ``response_mask`` excludes every token of a response that could not be scored.
    """

    scores: Tensor  # [B] float32, one a sequence; NaN = could not be scored
    old_logprobs: Tensor  # [B, T] float32
    ref_logprobs: Tensor | None  # [B, T] float32, of the reference policy where there is one
    values: Tensor | None  # [B, T] float32, where there is a critic
    observed: Mapping[str, Tensor]  # [B, T, ...] each, what the methods kept of every token

    def gathered(self) -> "Experience":
        """The experience of all ranks, rows in rank order."""

        def gather(name: str, rows: Tensor) -> Tensor:
            if name.startswith("prompt_"):  # padded on the left
                return gather_rows(rows.flip(1), 0).flip(1)
            return gather_rows(rows, 0)

        return self.map(gather)


@dataclass(frozen=True)
class TrainingBatch(Experience):
    """Experience with the targets of the update."""

    rewards: Tensor  # [B, T] float32, one a token
    advantages: Tensor  # [B, T] float32
    returns: Tensor | None  # [B, T] float32, the critic's targets where there is one
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # [B, T] each, in a loss's mean


def sequence_inputs(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Prompt and response side by side: input_ids and mask, each ``[B, P + T]``."""
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], dim=1)
    return ids, torch.cat([rollout.prompt_mask, rollout.response_mask], dim=1)
