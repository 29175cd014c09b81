"""Base of tasks: prompts and scores as a LightningDataModule.

A task is a subclass with three things: the stream of training prompts, the held-out prompts, and
the scorer.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.batches import PromptBatch
from tre_lightning.common.errors import Refused
from tre_lightning.common.seeding import permutation
from tre_lightning.common.validation import at_least
from tre_lightning.policy.chat import Messages
from tre_lightning.policy.encoding import (
    Conversation,
    control_tokens,
    encode_conversations,
    encode_texts,
    pad,
    textless_tokens,
)
from tre_lightning.policy.tokenizers import check_known, load_tokenizer, unknown_word
from tre_lightning.tasks.batching import share, spans
from tre_lightning.tasks.wording import DEFAULT, Wording, read_wording

_CHECKED_TRAIN_PROMPTS = 256  # prompts of the endless training stream whose length is checked first
_ENCODED_AT_ONCE = 1024  # prompts
_SHOWN = 160  # characters at the end of a prompt that an error message shows
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the data that its scorer needs.

    ``where`` is the file and row that it comes from, for error messages; empty if from none.
    ``fields`` are what ``data.template_file`` may name besides the text, ``{{prompt}}``.
    """

    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


class PromptDataModule(LightningDataModule, ABC):
    """Base of the tasks: batches of prompts that depend only on the seed and the iteration.

    Example:
        >>> class Sevens(PromptDataModule):
        ...     def train_prompt(self, index):
        ...         return Prompt(f"{index} + 7 =")
        ...     def heldout_prompts(self, stage):
        ...         return {stage: [Prompt("8 + 7 =")]}
        ...     def score(self, responses, prompts):
        ...         return torch.tensor([float("7" in response) for response in responses])
        >>> Sevens(batch_size=8).train_prompt(3).text
        '3 + 7 ='
    """

    binary_scores = True
    """Whether a score is 1 for right and 0 for wrong, so that pass@k means something."""

    own_text = ""
    """What the task itself writes: special tokens in it, such as ``<answer>``, are tokens in its
    prompts, and stand for text in responses. Special tokens that the data hold stay text."""

    def __init__(
        self,
        tokenizer: str | None = None,
        batch_size: int = 64,
        iterations_per_epoch: int = 10,
        eval_batch_size: int = 64,
        max_prompt_length: int = 512,
        seed: int = 42,
        long_prompts: Literal["error", "drop"] = "error",
        system: str | None = DEFAULT,
        template_file: str | None = None,
        few_shot_file: str | None = None,
        response_prefix: str = "",
    ) -> None:
        """Keep the options.

        Args:
            tokenizer: directory or hub name; the command line sets it to the policy's.
            batch_size: prompts an iteration, over all devices.
            iterations_per_epoch: PPO iterations an epoch; validation runs between epochs.
            eval_batch_size: held-out prompts a batch, over all devices.
            max_prompt_length: longest prompt, tokens.
            seed: of the prompts and their order.
            long_prompts: what happens to a longer prompt. ``drop`` leaves it out and logs how many
                there were; only for prompts of files, as generated ones have no end.
            system: system message before every prompt; ``default`` = what the chat template writes
                by itself, if it does; none = no system message, the template's left out.
            template_file: a text file that every prompt is put into, with ``{{prompt}}`` where its
                text belongs, or fields of the task; docs/tasks.md lists them.
            few_shot_file: a .jsonl or .parquet file of examples that stand before every prompt,
                with ``response`` and ``prompt``, or the fields that the template names.
            response_prefix: what every response begins with; the policy goes on after it, and it is
                graded with what the policy writes.
        """
        super().__init__()
        named = {
            "batch_size": batch_size,
            "iterations_per_epoch": iterations_per_epoch,
            "eval_batch_size": eval_batch_size,
            "max_prompt_length": max_prompt_length,
        }
        for name, value in named.items():
            at_least(f"data.{name}", value, 1)
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size
        self.iterations_per_epoch = iterations_per_epoch
        self.eval_batch_size = eval_batch_size
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.long_prompts = long_prompts
        if system is not None and not system.strip():
            raise ValueError(
                f"data.system={system!r} is empty; give null for no system message, or a text"
            )
        self.system = system
        self.template_file = template_file
        self.few_shot_file = few_shot_file
        self.response_prefix = response_prefix
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._own = ""  # own_text, and the tags of the wording
        self.vocabulary_size: int | None = None  # tokens that the policy knows, where that is known
        # A pass over so many prompts of a file, and their order.
        self._order: tuple[tuple[int, int], list[int]] = ((-1, 0), [])
        self.fingerprint: str | None = None  # of the first training prompts, once checked
        self._train_loader = IterationLoader(self._train_batch, iterations_per_epoch, batch_size)

    # ----- what a task defines

    @abstractmethod
    def train_prompt(self, index: int) -> Prompt:
        """Prompt number ``index`` of an endless training stream; a pure function."""

    @abstractmethod
    def heldout_prompts(self, stage: str) -> dict[str, list[Prompt]]:
        """Held-out prompts by the name their metrics carry.

        Args:
            stage: ``val`` or ``test``.
        """

    @abstractmethod
    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """Scores ``[len(prompts) * n]`` of n responses a prompt; NaN = could not be scored."""

    def answers(
        self, responses: Sequence[str], prompts: PromptBatch
    ) -> Sequence[Hashable | None] | None:
        """The answer in each response, for majority@k.

        Args:
            responses: n responses a prompt, ``[len(prompts) * n]``.
            prompts: what they respond to.

        Returns:
            For each response its answer in a normal form, equal for equal answers, or None where
            it gives none. None = the task has no discrete answers, hence no majority@k.
        """
        return None

    def scorer_timeouts(self) -> int | None:
        """Number of answers whose scoring timed out since the last call, on this rank.

        None = a scorer without time limit, hence no such metric.
        """
        return None

    def file_prompts(self) -> dict[str, list[Prompt]]:
        """The lists of prompts that come from files, by the option that names the file.

        These are the task's own lists, not copies: what is too long is taken out of them once,
        before the first prompt is asked for. A task without files needs none.
        """
        return {}

    def vocabulary(self) -> list[str]:
        """Words that a tokenizer from scratch needs; only for tasks of a closed vocabulary."""
        raise ValueError(
            f"{type(self).__name__} has no closed vocabulary; give model.policy.model or "
            "model.policy.tokenizer a pretrained tokenizer"
        )

    def shuffled(self, prompts: Sequence[Prompt], index: int) -> Prompt:
        """Prompt number ``index`` of an endless stream of these, shuffled anew every pass."""
        passes, place = divmod(index, len(prompts))
        if self._order[0] != (passes, len(prompts)):
            order = permutation(len(prompts), "train_file", self.seed, passes)
            self._order = ((passes, len(prompts)), order.tolist())
        return prompts[self._order[1][place]]

    # ----- what Lightning asks

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer, read the files, and check every prompt's length."""
        if self._tokenizer is None:
            if self.tokenizer_source is None:
                raise ValueError("data.tokenizer is not set; give a directory or hub name")
            self.check(load_tokenizer(self.tokenizer_source))

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenize with this tokenizer; nothing is checked."""
        self._tokenizer = tokenizer
        said = " ".join(self.wording.texts)
        named = [token for token in control_tokens(tokenizer) if token in said]
        if named:  # a tag such as <think>; nobody ends a turn by writing the token for it
            textless = {*textless_tokens(tokenizer, self.own_text)}
            named = [token for token in named if control_tokens(tokenizer)[token] not in textless]
        self._own = " ".join([self.own_text, *named])

    @cached_property
    def wording(self) -> Wording:
        """What stands around every prompt; the files are read when it is first needed.

        Raises:
            ValueError: naming the option, if a file cannot be read or has not what it needs.
        """
        return read_wording(
            self.system, self.template_file, self.few_shot_file, self.response_prefix
        )

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use this tokenizer; refuse data that cannot be read and prompts that are too long."""
        self.use(tokenizer)
        files = self.file_prompts()
        first = next((listed[0] for listed in files.values() if listed), None)
        self._check_wording(tokenizer, first or self.train_prompt(0))
        if self.long_prompts == "drop":
            if not files:
                raise ValueError(
                    "data.long_prompts=drop needs prompts of a file; use error and raise "
                    "data.max_prompt_length"
                )
            for name, listed in files.items():
                listed[:] = self.fitting(name, listed)
        prompts = [self.train_prompt(i) for i in range(_CHECKED_TRAIN_PROMPTS)]
        texts_of_all = "\0".join(prompt.text for prompt in prompts)
        if self.wording != Wording():
            texts_of_all += repr(self.wording)
        self.fingerprint = hashlib.blake2b(texts_of_all.encode(), digest_size=8).hexdigest()
        for stage in ("val", "test"):
            for name, held_out in self.heldout_prompts(stage).items():
                self._warn_of_examples(name, held_out)
                prompts += held_out
        for listed in files.values():
            prompts += listed
        self.longest_prompt = 0
        for start in range(0, len(prompts), _ENCODED_AT_ONCE):
            some = prompts[start : start + _ENCODED_AT_ONCE]
            rows = self._encode(some)
            self.longest_prompt = max(self.longest_prompt, *map(len, rows))
            for prompt, ids in zip(some, rows, strict=True):
                if tokenizer.unk_token_id not in ids:
                    continue
                text = self._conversation(prompt).rendered(tokenizer, "policy", ask=True)
                word = unknown_word(tokenizer, text)
                if word is None:
                    continue
                fix = "widen the ranges of the task's numbers or drop the prompt"
                if word not in prompt.text:
                    fix = "its chat template writes it: give a tokenizer whose template fits it"
                    if any(word in text for text in self.wording.texts):
                        fix = "reword data.template_file, few_shot_file, system or response_prefix"
                raise ValueError(
                    f"{_named(prompt)} holds a word that the tokenizer does not know, "
                    f"{word[:40]!r}; {fix}"
                )

    def fitting(self, name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts of at most ``max_prompt_length`` tokens; logs how many are left out.

        Args:
            name: the option that the prompts come from.
            prompts: after the tokenizer is known.

        Raises:
            ValueError: if none is left.
        """
        kept: list[Prompt] = []
        for start in range(0, len(prompts), _ENCODED_AT_ONCE):
            some = prompts[start : start + _ENCODED_AT_ONCE]
            fits = (len(ids) <= self.max_prompt_length for ids in self.prompt_ids(some))
            kept += [prompt for prompt, fit in zip(some, fits, strict=True) if fit]
        if prompts and not kept:
            raise ValueError(
                f"data.max_prompt_length={self.max_prompt_length} is too short for all "
                f"{len(prompts)} prompts of data.{name}; raise it"
            )
        if len(kept) < len(prompts):
            _log.warning(
                "left out %d of %d prompts of data.%s longer than data.max_prompt_length=%d tokens",
                *(len(prompts) - len(kept), len(prompts), name, self.max_prompt_length),
            )
        return kept

    def train_dataloader(self) -> "IterationLoader":
        """One batch per iteration; a resumed run continues at the right one."""
        return self._train_loader

    def state_dict(self) -> dict[str, int]:
        """The next iteration; Lightning restores a loader's own state within an epoch only."""
        return self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from the saved iteration."""
        self._train_loader.load_state_dict(state_dict)

    def go_back_to(self, iteration: int) -> None:
        """Rewind to an earlier iteration of this run."""
        self._train_loader.go_back_to(iteration)

    def val_dataloader(self) -> list["BatchList"]:
        """A loader for each held-out set."""
        return self._heldout_loaders("val")

    def test_dataloader(self) -> list["BatchList"]:
        """A loader for each test set."""
        return self._heldout_loaders("test")

    def predict_dataloader(self) -> list["BatchList"]:
        """The test sets."""
        return self._heldout_loaders("test")

    # ----- batches

    def messages(self, prompt: Prompt) -> Messages:
        """The chat messages of a prompt."""
        return [{"role": "user", "content": prompt.text}]

    def plain(self, messages: Messages) -> str:
        """Messages as the text that a policy without a chat template reads."""
        text = ""
        for message in messages:
            between = " " if message["role"] == "assistant" else "\n\n"
            text += (between if text else "") + message["content"]
        return text

    def render(self, prompt: Prompt) -> str:
        """The prompt in the tokenizer's chat template, where it has one, without the prefix."""
        conversation = self._conversation(prompt)._replace(prefix="")
        if self._tokenizer is None:
            return conversation.text
        return conversation.rendered(self._tokenizer, "policy", ask=True)

    def _conversation(self, prompt: Prompt) -> Conversation:
        """What the policy reads."""
        wording, messages, text = self.wording, self.messages(prompt), prompt.text
        if wording != Wording():
            messages = wording.around(messages, prompt.fields)
            text = self.plain(messages)
        return Conversation(messages, text, wording.prefix, wording.system is not None)

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, as the policy reads them in training, tests and demonstrations."""
        rows = [self._conversation(prompt) for prompt in prompts]
        try:
            return encode_conversations(self._known, rows, "policy", ask=True, own=self._own)
        except ValueError:  # of the chat template; say of which prompt
            for prompt in prompts:
                try:
                    self.render(prompt)
                except ValueError as error:
                    raise ValueError(f"{_named(prompt)}: {error}") from error
            raise

    def decoded(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens included."""
        return str(self._known.decode(list(ids), clean_up_tokenization_spaces=False))

    def demonstration_ids(
        self, demonstrations: Sequence[tuple[Prompt | str, str]]
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of the prompts and of the responses, these with the end token.

        A response prefix belongs to the prompt.

        Raises:
            Refused: for a token that the model does not know, and a response without the prefix.
        """
        prefix = self.response_prefix
        for _, response in demonstrations:
            if not response.startswith(prefix):
                raise Refused(
                    f"data.response_prefix={prefix!r} does not begin the task's worked responses, "
                    f"such as {response[:_SHOWN]!r}; set warm_start to null or change the prefix"
                )
        prompts = [Prompt(p) if isinstance(p, str) else p for p, _ in demonstrations]
        asked = self.prompt_ids(prompts)
        rest = [response[len(prefix) :] for _, response in demonstrations]
        answered = encode_texts(self._known, rest, own=self._own)
        largest = map(max, filter(None, (*asked, *answered)))
        check_known(largest, self._known, self.vocabulary_size, "a demonstration: its token")
        end = int(self._known.eos_token_id)
        return [(p, [*a, end]) for p, a in zip(asked, answered, strict=True)]

    def _warn_of_examples(self, name: str, prompts: Sequence[Prompt]) -> None:
        """Warn of held-out prompts whose answer an example gives."""
        asked = {m["content"] for m in self.wording.examples if m["role"] == "user"}
        last = (self._conversation(prompt).messages[-1]["content"] for prompt in prompts if asked)
        if given := sum(content in asked for content in last):
            _log.warning(
                "%d of %d prompts of %s are examples of data.few_shot_file=%s, which gives their "
                "answers; take other examples",
                *(given, len(prompts), name, self.few_shot_file),
            )

    def _check_wording(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
        """Refuse what this task's prompts or this tokenizer's chat template cannot give."""
        wording, system = self.wording, self.wording.system
        self._conversation(prompt)
        given = f"data.system={'null' if system is None else repr(system[:_SHOWN])}"
        if tokenizer.chat_template is None:
            if system not in (None, DEFAULT):
                raise ValueError(
                    f"{given} needs a chat template, and data.tokenizer={self.tokenizer_source} "
                    "has none; give a tokenizer with one, or put the text into data.template_file"
                )
            return
        if system == DEFAULT and not wording.examples:
            return
        examples = f"data.few_shot_file={self.few_shot_file}"
        try:
            text = self.render(prompt)
        except ValueError as error:
            option = examples if system == DEFAULT else given
            raise ValueError(f"{option}: {error}") from error
        shown = [(given, system)] if system not in (None, DEFAULT) else []
        shown += [(examples, message["content"]) for message in wording.examples]
        for option, said in shown:
            if " ".join(str(said).split()) not in " ".join(text.split()):
                raise ValueError(
                    f"{option}: the policy's chat template does not write {str(said)[:40]!r}; "
                    "leave the option out, or give a tokenizer with another template"
                )

    @property
    def _known(self) -> PreTrainedTokenizerBase:
        assert self._tokenizer is not None, "setup() comes first"
        return self._tokenizer

    def _train_batch(self, iteration: int, start: int) -> PromptBatch:
        rank, ranks = self._world()
        first, end = share(self.batch_size, rank, ranks)
        prompts = [self.train_prompt(start + row) for row in range(first, end)]
        return self._batch(prompts, "train", iteration, first, self.batch_size)

    def _heldout_loaders(self, stage: str) -> list["BatchList"]:
        rank, ranks = self._world()
        loaders = []
        for split, prompts in self.heldout_prompts(stage).items():
            if len(prompts) < ranks:
                raise ValueError(
                    f"{split} holds {len(prompts)} prompts for {ranks} devices; raise "
                    f"data.{split}_size or use fewer devices"
                )
            batches = []
            whole = spans(len(prompts), self.eval_batch_size, ranks)
            for index, (start, stop) in enumerate(whole):
                first, end = share(stop - start, rank, ranks)
                rows = prompts[start + first : start + end]
                batches.append((rows, split, index, first, stop - start))
            loaders.append(BatchList(batches, self._batch))
        return loaders

    def _batch(
        self, prompts: list[Prompt], split: str, index: int, first_row: int, total_rows: int
    ) -> PromptBatch:
        rows = self._encode(prompts)
        ids, mask = pad(rows, int(self._known.pad_token_id), "left")
        return PromptBatch(
            prompt_ids=ids,
            prompt_mask=mask.bool(),
            texts=tuple(map(self.render, prompts)),
            extras=tuple(prompt.extra for prompt in prompts),
            split=split,
            index=index,
            first_row=first_row,
            total_rows=total_rows,
            questions=tuple(prompt.text for prompt in prompts),
        )

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the prompts; refuses empty and too long ones."""
        rows = self.prompt_ids(prompts)
        for prompt, ids in zip(prompts, rows, strict=True):
            if len(ids) > self.max_prompt_length:
                raise ValueError(
                    f"data.max_prompt_length={self.max_prompt_length} is too short for "
                    f"{_named(prompt)} of {len(ids)} tokens; raise it or drop the prompt"
                )
            if not ids:
                raise ValueError(f"{_named(prompt)} has no token; drop the prompt")
            what = f"{_named(prompt)}: its token"
            assert self._tokenizer is not None
            check_known(ids, self._tokenizer, self.vocabulary_size, what)
        return rows

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def _named(prompt: Prompt) -> str:
    """The prompt in an error message: its file and row, and its last words."""
    text = prompt.text
    end = repr(text) if len(text) <= _SHOWN else f"that ends in {text[-_SHOWN:]!r}"
    return f"{prompt.where}: the prompt {end}" if prompt.where else f"the prompt {end}"


class IterationLoader:
    """Batches of one epoch, from the current iteration on.

    It keeps its place in the stream of prompts too, so that a run that goes on with another batch
    size leaves none out and takes none twice.
    """

    def __init__(
        self,
        batch: Callable[[int, int], PromptBatch],
        iterations_per_epoch: int,
        batch_size: int,
    ) -> None:
        """``batch`` makes the batch of an iteration, given the number of its first prompt."""
        self._batch = batch
        self._length = iterations_per_epoch
        self._batch_size = batch_size
        self._iteration = 0
        self._prompt = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[PromptBatch]:
        # An epoch that goes on after a resume, or has fewer batches, is ended by Lightning.
        for _ in range(self._length):
            iteration, prompt = self._iteration, self._prompt
            self._iteration += 1
            self._prompt += self._batch_size
            yield self._batch(iteration, prompt)

    def state_dict(self) -> dict[str, int]:
        """The next iteration, and its first prompt."""
        return {"iteration": self._iteration, "prompt": self._prompt}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the saved iteration."""
        self._iteration = state["iteration"]
        self._prompt = state.get("prompt", self._iteration * self._batch_size)

    def go_back_to(self, iteration: int) -> None:
        """Rewind to an earlier iteration of this run."""
        self._prompt -= (self._iteration - iteration) * self._batch_size
        self._iteration = iteration


class BatchList:
    """A fixed list of batches, each made on access."""

    def __init__(
        self,
        batches: list[tuple[list[Prompt], str, int, int, int]],
        make: Callable[..., PromptBatch],
    ) -> None:
        """``make`` turns an entry into a batch."""
        self._batches = batches
        self._make = make

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        return (self._make(*batch) for batch in self._batches)
