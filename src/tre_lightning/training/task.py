"""The protocol of tasks: what PPO needs besides prompts."""

import math
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tre_lightning.batches import PromptBatch
from tre_lightning.common.errors import ScoreError


class Task(Protocol):
    """Protocol of a data module with scores; ``PromptDataModule`` has the defaults."""

    binary_scores: bool
    """Whether a score is 1 for right and 0 for wrong, so that pass@k means something."""

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """One score a response ``[len(prompts) * n]``; NaN = could not be scored."""

    def answers(
        self, responses: Sequence[str], prompts: PromptBatch
    ) -> Sequence[Hashable | None] | None:
        """The answer in each response (None = none), for majority@k; None = no discrete answers."""

    def scorer_timeouts(self) -> int | None:
        """Answers that timed out since the last call, on this rank; None = no time limit."""


def scores_of(task: Task, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
    """The task's scores, float32 ``[len(responses)]``; NaN = could not be scored.

    A task may give a tensor, an array of numpy or any sequence of numbers; None counts as NaN.

    Raises:
        ScoreError: for another number of scores, for what is no number, and for an infinite one.
    """
    scores = _as_tensor(task.score(responses, prompts))
    if scores.shape != (len(responses),):
        raise ScoreError(
            f"the scorer gave {list(scores.shape)} scores for {len(responses)} responses; give one "
            "score a response"
        )
    if (infinite := scores.to(torch.float32).isinf()).any():
        row = int(infinite.nonzero()[0])
        raise ScoreError(
            f"the scorer gave {float(scores[row])} to the response {responses[row][:80]!r}; "
            "give a finite score, or NaN for a response that cannot be scored"
        )
    return scores.to(torch.float32)


def _as_tensor(scores: object) -> Tensor:
    """Scores from any container as a tensor of real numbers."""
    if isinstance(scores, Tensor):
        if scores.is_complex():
            raise ScoreError(f"the scorer gave complex scores ({scores.dtype}); give real ones")
        return scores.detach().reshape(scores.shape or (1,))
    try:
        if isinstance(scores, Mapping | str | bytes):
            raise TypeError
        numbers = [math.nan if score is None else _number(score) for score in scores]  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        raise ScoreError(
            f"the scorer gave {reprlib.repr(scores)}, a {type(scores).__name__}; give a tensor, an "
            "array or a list with a number for each response"
        ) from None
    return torch.tensor(numbers, dtype=torch.float64)


def _number(score: object) -> float:
    if isinstance(score, str | bytes):
        raise TypeError
    return float(score)  # type: ignore[arg-type]
