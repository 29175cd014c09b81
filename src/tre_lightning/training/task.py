"""What PPO asks of a task besides prompts."""

import math
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tre_lightning.batches import PromptBatch
from tre_lightning.common.errors import ScoreError


class Task(Protocol):
    """The scores of a data module; ``PromptDataModule`` says what its methods give by default."""

    binary_scores: bool
    """Whether a score is 1 for right and 0 for wrong, so that pass@k means something."""

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """One score a response ``[len(prompts) * n]``; NaN = could not be scored."""

    def answers(
        self, responses: Sequence[str], prompts: PromptBatch
    ) -> Sequence[Hashable | None] | None:
        """What each response answers, None = nothing; None = no discrete answers, no majority@k."""

    def scorer_timeouts(self) -> int | None:
        """Answers given up since this was last asked, on this rank; None = no such count."""


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
    """Scores as a tensor of real numbers, whatever holds them."""
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
