"""What PPO asks of a task besides prompts."""

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor

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
