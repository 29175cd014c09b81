"""Demonstrations: worked responses of a task, for a supervised warm start (SFT)."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.common.errors import Refused
from tre_lightning.common.seeding import uniforms
from tre_lightning.common.validation import at_least, unit_fraction
from tre_lightning.policy.encoding import pad
from tre_lightning.tasks.base import Prompt, PromptDataModule

Demonstration = tuple[Prompt | str, str]  # the prompt, or its text alone, and the response


class DemonstrationBatch(NamedTuple):
    """Prompts and responses side by side, padded on the right."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, True = a real token
    response_mask: Tensor  # [B, T] bool, True = of the response, the end token included


@runtime_checkable
class Demonstrates(Protocol):
    """Protocol of a task that has demonstrations."""

    def demonstration(self, index: int, misleading: bool) -> Demonstration:
        """Prompt and response number ``index``; misleading ones do not solve the prompt."""


class Demonstrations(LightningDataModule):
    """Batches of a task's demonstrations; a pure function of the seed and the step."""

    def __init__(
        self,
        task: PromptDataModule,
        steps: int = 900,
        batch_size: int = 128,
        misleading_fraction: float = 0.0,
    ) -> None:
        """Keep the options.

        Args:
            task: the task whose demonstrations these are.
            steps: batches.
            batch_size: demonstrations a batch.
            misleading_fraction: fraction of the demonstrations that do not solve their prompt, in
                [0, 1].
        """
        super().__init__()
        if not isinstance(task, Demonstrates):
            raise ValueError(f"{type(task).__name__} has no demonstration() to learn from")
        at_least("data.steps", steps, 1)
        at_least("data.batch_size", batch_size, 1)
        unit_fraction("data.misleading_fraction", misleading_fraction)
        self.task: Demonstrates = task
        self.prompts = task
        self.steps = steps
        self.batch_size = batch_size
        self.misleading_fraction = misleading_fraction

    def vocabulary(self) -> list[str]:
        """The task's closed vocabulary."""
        return self.prompts.vocabulary()

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenize with this tokenizer, as the task does its prompts; the module calls it."""
        self.pad_token_id = int(tokenizer.pad_token_id)
        try:
            self.prompts.use(tokenizer)
        except ValueError as error:
            raise Refused(str(error)) from error

    def train_dataloader(self) -> "DemonstrationLoader":
        """All the batches, once."""
        return DemonstrationLoader(self)


class DemonstrationLoader:
    """Batches of tokenized prompts and responses."""

    def __init__(self, source: Demonstrations) -> None:
        """``source`` says how many and how large."""
        self._source = source

    def __len__(self) -> int:
        return self._source.steps

    def __iter__(self) -> Iterator[DemonstrationBatch]:
        source = self._source
        for step in range(source.steps):
            first = step * source.batch_size
            draws = uniforms(1, source.batch_size, "misleading", source.prompts.seed, step)[0]
            shown = [
                source.task.demonstration(first + i, bool(draw < source.misleading_fraction))
                for i, draw in enumerate(draws)
            ]
            rows = source.prompts.demonstration_ids(shown)
            ids, mask = pad([prompt + response for prompt, response in rows], source.pad_token_id)
            asked = torch.tensor([[len(prompt)] for prompt, _ in rows])
            attention = mask.bool()
            yield DemonstrationBatch(
                ids, attention, attention & (torch.arange(ids.shape[1]) >= asked)
            )
