"""Worked responses of a task, for a supervised warm start."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule

from tre_lightning.args import at_least, unit_share
from tre_lightning.data.prompts import PromptDataModule
from tre_lightning.seeding import uniforms

Demonstration = tuple[str, str]  # prompt and response as text


@runtime_checkable
class Demonstrates(Protocol):
    """A task that can show how it is done."""

    def demonstration(self, index: int, misleading: bool) -> Demonstration:
        """Prompt and response number ``index``; misleading ones do not solve the prompt."""


class Demonstrations(LightningDataModule):
    """Batches of a task's demonstrations; a pure function of the seed and the step."""

    def __init__(
        self,
        task: PromptDataModule,
        steps: int = 900,
        batch_size: int = 128,
        misleading_share: float = 0.0,
    ) -> None:
        """Keep the options.

        Args:
            task: the task whose demonstrations these are.
            steps: batches.
            batch_size: demonstrations a batch.
            misleading_share: share of the demonstrations that do not solve their prompt, in [0, 1].
        """
        super().__init__()
        if not isinstance(task, Demonstrates):
            raise ValueError(f"{type(task).__name__} has no demonstration() to learn from")
        at_least("data.steps", steps, 1)
        at_least("data.batch_size", batch_size, 1)
        unit_share("data.misleading_share", misleading_share)
        self.task: Demonstrates = task
        self.prompts = task
        self.steps = steps
        self.batch_size = batch_size
        self.misleading_share = misleading_share

    def vocabulary(self) -> list[str]:
        """The task's closed vocabulary."""
        return self.prompts.vocabulary()

    def train_dataloader(self) -> "DemonstrationLoader":
        """All the batches, once."""
        return DemonstrationLoader(self)


class DemonstrationLoader:
    """Batches of (prompt, response) texts."""

    def __init__(self, source: Demonstrations) -> None:
        """``source`` says how many and how large."""
        self._source = source

    def __len__(self) -> int:
        return self._source.steps

    def __iter__(self) -> Iterator[list[Demonstration]]:
        source = self._source
        for step in range(source.steps):
            first = step * source.batch_size
            draws = uniforms(1, source.batch_size, "misleading", source.prompts.seed, step)[0]
            yield [
                source.task.demonstration(first + i, bool(draw < source.misleading_share))
                for i, draw in enumerate(draws)
            ]
