"""What PPO asks of a task besides prompts."""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tre_lightning.errors import ScoreError
from tre_lightning.rollout import PromptBatch


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

    Raises:
        ValueError: for another number of scores.
        ScoreError: for an infinite one.
    """
    scores = task.score(responses, prompts)
    if scores.shape != (len(responses),):
        raise ValueError(
            f"the scorer gave {list(scores.shape)} scores for {len(responses)} responses"
        )
    scores = scores.to(torch.float32)
    if scores.isinf().any():
        row = int(scores.isinf().nonzero()[0])
        raise ScoreError(
            f"the scorer gave {float(scores[row])} to the response {responses[row][:80]!r}; "
            "give a finite score, or NaN for a response that cannot be scored"
        )
    return scores
