r"""Alignment prompts, whose responses a reward model scores.

A row of a file or of a dataset of the hub has one of these forms; other columns are ignored:

* ``prompt``: a string, a transcript that starts with ``\n\nHuman:``, or a list of messages;
* a pair of responses in one of the forms of :mod:`tre_lightning.tasks.alignment.pairs`, such as
  UltraFeedback-binarized or Anthropic's HH data; its prompt counts, and the responses do not.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.batches import PromptBatch
from tre_lightning.common.seeding import derived_seed, permutation
from tre_lightning.common.validation import at_least
from tre_lightning.policy.chat import ASSISTANT, ChatPrompt, Messages, as_messages, transcript
from tre_lightning.tasks.alignment.pairs import (
    read_pair,
    synthetic_pair,
    synthetic_prompt,
    synthetic_vocabulary,
)
from tre_lightning.tasks.alignment.remote import RemoteScorer
from tre_lightning.tasks.alignment.scorer import Dtype, PreferenceScorer, RewardModelScorer
from tre_lightning.tasks.base import Prompt, PromptDataModule
from tre_lightning.tasks.sources import Source, read_rows, warn_of_unscorable

_ANOTHER = 2**40  # from a synthetic prompt of another set to the next that takes its place
_DRAWS_A_PROMPT = 20  # synthetic prompts looked at for each one that is held out
_SETS = ("train", "train", "val", "test")  # of the synthetic prompts, equally many in each
_POOLS = ("train_file", "eval_file")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardArgs:
    """Options of the scorer: a reward model in this process or a server, exactly one.

    Args:
        model: directory or hub name of a sequence classifier with one label; it is frozen, runs on
            the trainer's device, and no checkpoint holds it.
        url: address of a reward server; tre_lightning.tasks.alignment.remote has the protocol.
        batch_size: responses in a forward pass or request.
        max_length: longest text (prompt and response) of ``model``, tokens; a longer one cannot be
            scored. None = the model's context.
        dtype: of the weights of ``model``.
        timeout_s: longest time of an attempt to reach ``url``, seconds.
        retries: further attempts.
    """

    model: str | None = None
    url: str | None = None
    batch_size: int = 64
    max_length: int | None = None
    dtype: Dtype = "float32"
    timeout_s: float = 30.0
    retries: int = 3

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            raise ValueError(
                "give exactly one of data.reward.model (a directory or hub name) and "
                f"data.reward.url, not model={self.model}, url={self.url}"
            )
        if self.url is not None:
            self.scorer()

    def scorer(self) -> PreferenceScorer:
        """The scorer; a model's weights are loaded when they are first needed.

        Raises:
            ValueError: if an option cannot work, or there is no such model.
        """
        if self.url is not None:
            return RemoteScorer(self.url, self.timeout_s, self.retries, self.batch_size)
        return RewardModelScorer(str(self.model), self.batch_size, self.max_length, self.dtype)


class PreferenceDataModule(PromptDataModule):
    r"""Prompts without a gold answer; a reward model scores the responses.

    Training, validation and test prompts are disjoint. Without files they are the synthetic ones of
    :mod:`tre_lightning.tasks.alignment.pairs`, about 1,500 different ones to train on and 750 each
    to validate and test; a reward model trained on the synthetic pairs has seen most of them.

    A policy with a chat template gets a prompt's messages in it, another one a transcript
    ``\n\nHuman: ...\n\nAssistant:``. The scorer gets the messages.
    """

    binary_scores = False

    def __init__(
        self,
        reward: RewardArgs,
        train_file: str | None = None,
        eval_file: str | None = None,
        exclude_file: str | None = None,
        train_split: str = "train",
        eval_split: str = "test",
        exclude_split: str = "train",
        train_size: int | None = None,
        val_size: int = 256,
        test_size: int = 512,
        train_name: str | None = None,
        eval_name: str | None = None,
        exclude_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the options; files are read by :meth:`check`.

        Args:
            reward: what scores the responses.
            train_file: a .jsonl or .parquet file of prompts to train on, or the name of a dataset
                of the hub; none = the synthetic prompts.
            eval_file: the same for validation and test; none = held out from ``train_file``.
            exclude_file: the same for what the reward model was trained on: no prompt of it is
                trained on, validated or tested with.
            train_split: split of ``train_file`` where it is a dataset of the hub.
            eval_split: split of ``eval_file``.
            exclude_split: split of ``exclude_file``.
            train_size: training prompts (paper: 7500); none = all that are left.
            val_size: validation prompts.
            test_size: test prompts (paper: 5000).
            train_name: configuration of ``train_file`` where it is a dataset of the hub that has
                several.
            eval_name: configuration of ``eval_file``.
            exclude_name: configuration of ``exclude_file``.
            kwargs: options of :class:`PromptDataModule`; ``long_prompts: drop`` leaves long prompts
                out before the sizes are cut.
        """
        super().__init__(**kwargs)
        for name, value in (("val_size", val_size), ("test_size", test_size)):
            at_least(f"data.{name}", value, 1)
        if train_size is not None:
            at_least("data.train_size", train_size, 1)
        named = {"eval_file": eval_file, "exclude_file": exclude_file, "train_size": train_size}
        for name, given in named.items():
            if train_file is None and given is not None:
                raise ValueError(
                    f"data.{name}={given} needs data.train_file: the synthetic prompts are not of "
                    "a file, and without end"
                )
        self.reward = reward
        self.files = {
            "train_file": Source(train_file, train_split, train_name),
            "eval_file": Source(eval_file, eval_split, eval_name),
            "exclude_file": Source(exclude_file, exclude_split, exclude_name),
        }
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.excluded = 0  # prompts that were left out because exclude_file has them
        self._from_files: dict[str, list[Prompt]] = {}  # by train, val and test

    @property
    def synthetic(self) -> bool:
        """Whether the prompts are synthetic."""
        return self.files["train_file"][0] is None

    @cached_property
    def scorer(self) -> PreferenceScorer:
        """The reward model or server."""
        return self.reward.scorer()

    # ----- prompts

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use this tokenizer; refuse prompts and a scorer that cannot work.

        Raises:
            ValueError: if a file or the reward model cannot be read, or prompts are too few.
            RewardServerError: if the server does not answer.
        """
        self.use(tokenizer)
        if not self.synthetic:
            self._from_files = self._read_files()
        super().check(tokenizer)
        first = self.train_prompt(0)
        self.scorer.score([first.extra["messages"]], ["a response to try the scorer"])

    def train_prompt(self, index: int) -> Prompt:
        """Prompt number ``index`` of the training stream; files are shuffled anew every pass."""
        if self.synthetic:
            return _prompt(synthetic_prompt(self._synthetic(index), self.seed))
        return self.shuffled(self._from_files["train"], index)

    def heldout_prompts(self, stage: str) -> dict[str, list[Prompt]]:
        """The validation prompts as ``val`` or the test prompts as ``test``."""
        prompts = self._distinct(stage) if self.synthetic else self._from_files[stage]
        return {stage: prompts}

    def file_prompts(self) -> dict[str, list[Prompt]]:
        """The training prompts of a file; held-out ones are checked in any case."""
        return {} if self.synthetic else {"train_file": self._from_files["train"]}

    def messages(self, prompt: Prompt) -> Messages:
        """The prompt's messages."""
        found = prompt.extra.get("messages")
        return as_messages(prompt.text) if found is None else list(found)

    def plain(self, messages: Messages) -> str:
        """The transcript, up to where the response begins."""
        return transcript(messages) + ASSISTANT

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """The reward model's scores, ``[len(prompts) * n]`` float32; NaN = could not be scored.

        Raises:
            RewardServerError: if the server gives no valid scores.
        """
        n = len(responses) // len(prompts)
        scorer = self.scorer
        if isinstance(scorer, RewardModelScorer):
            scorer.to(prompts.prompt_ids.device)
        asked = [extra["messages"] for extra in prompts.extras for _ in range(n)]
        return torch.tensor(scorer.score(asked, responses), dtype=torch.float32)

    def demonstration(self, index: int, misleading: bool) -> tuple[str, str]:
        """Prompt and response number ``index`` of the synthetic training pairs.

        A misleading one is the pair's worse response: a mix leaves room for reinforcement.

        Raises:
            ValueError: for prompts of a file.
        """
        if not self.synthetic:
            raise ValueError(
                f"data.train_file={self.files['train_file'][0]} has no responses to learn from; "
                "set warm_start to null and give model.policy.model"
            )
        pair = synthetic_pair(self._synthetic(index), self.seed)
        response = pair.rejected if misleading else pair.chosen
        return _prompt(pair.prompt).text, response

    def vocabulary(self) -> list[str]:
        """Every word of the synthetic prompts and responses."""
        return synthetic_vocabulary() if self.synthetic else super().vocabulary()

    # ----- synthetic prompts

    def _synthetic(self, index: int) -> int:
        """Position of training prompt number ``index`` among all the synthetic prompts.

        The set of a prompt depends on its words alone, not on the sizes of the sets: a warm start
        is of use for all sizes.
        """
        places = count(index, _ANOTHER)
        return next(p for p in places if _set(synthetic_prompt(p, self.seed)) == "train")

    def _distinct(self, stage: str) -> list[Prompt]:
        """The first ``val_size`` or ``test_size`` different prompts of the set."""
        wanted = self.sizes[stage] or 0
        found: dict[str, None] = {}
        for place in range(_DRAWS_A_PROMPT * wanted):
            text = synthetic_prompt(place, self.seed)
            if _set(text) == stage:
                found[text] = None
            if len(found) == wanted:
                return [_prompt(text) for text in found]
        raise ValueError(
            f"data.{stage}_size={wanted}, but there are only about {len(found)} different "
            f"synthetic {stage} prompts; lower it or give data.train_file"
        )

    # ----- prompts of files

    def _read_files(self) -> dict[str, list[Prompt]]:
        """Training, validation and test prompts, shuffled by the seed."""
        found = {name: self._load(name) for name in self.files}
        excluded = found["exclude_file"]
        self.excluded = sum(key in excluded for name in _POOLS for key in found[name])
        if self.excluded:
            _log.warning(
                "left out %d prompts that data.exclude_file=%s holds too",
                *(self.excluded, self.files["exclude_file"][0]),
            )
        held_out = found["eval_file"]
        unseen = {k: p for k, p in found["train_file"].items() if k not in excluded | held_out}
        train = self._in_order("train_file", unseen)
        if self.files["eval_file"][0] is None:
            source, rest = "train_file", train
        else:
            held_out = {k: p for k, p in held_out.items() if k not in excluded}
            source, rest = "eval_file", self._in_order("eval_file", held_out)
        sets: dict[str, list[Prompt]] = {}
        for stage in ("test", "val"):  # the test prompts do not depend on the other sizes
            sets[stage], rest = self._cut(stage, source, rest)
        sets["train"], _ = self._cut(
            "train", "train_file", rest if source == "train_file" else train
        )
        return sets

    def _load(self, name: str) -> dict[str, Prompt]:
        """The different prompts of a file by their content."""
        source, split, configuration = self.files[name]
        if source is None:
            return {}
        prompts: dict[str, Prompt] = {}
        blank: list[str] = []
        total = 0
        for where, row in read_rows(f"data.{name}", source, split, configuration):
            total += 1
            messages = read_prompt(row, where)
            if messages is None:
                continue
            if not messages[-1]["content"].strip():
                blank.append(f"{where}: the last message is empty")
            prompts.setdefault(json.dumps(messages), _prompt(messages, where))
        if not prompts:
            raise ValueError(f"data.{name}={source} holds no prompt; give another")
        warn_of_unscorable(f"data.{name}", source, blank, total)
        return prompts

    def _in_order(self, name: str, prompts: Mapping[str, Prompt]) -> list[Prompt]:
        """The prompts shuffled by the seed, without those dropped as too long."""
        keys = sorted(prompts)  # whatever their order in the file
        order = permutation(len(keys), name, self.seed).tolist()
        shuffled = [prompts[keys[place]] for place in order]
        return shuffled if self.long_prompts == "error" else self.fitting(name, shuffled)

    def _cut(
        self, stage: str, name: str, prompts: list[Prompt]
    ) -> tuple[list[Prompt], list[Prompt]]:
        """Split the prompts into the first ``size`` and the others."""
        wanted = self.sizes[stage]
        size = max(len(prompts), 1) if wanted is None else wanted
        if len(prompts) < size:
            raise ValueError(
                f"only {len(prompts)} prompts of data.{name}={self.files[name][0]} are left for "
                f"data.{stage}_size={wanted}; lower the sizes"
            )
        return prompts[:size], prompts[size:]


def read_prompt(row: Mapping[str, Any], where: str) -> Messages | None:
    """The prompt in a row of one of the forms above; None = a pair without a difference.

    Raises:
        ValueError: if the row has none of these forms; the message starts with ``where``.
    """
    if "chosen" in row:
        pair = read_pair(row, where)
        if pair is None:
            return None
        messages = as_messages(pair.prompt)
    else:
        try:
            messages = as_messages(row.get("prompt"))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the prompt ends with the assistant's message; drop that")
    # No tokenizer takes a lone surrogate, which JSON may hold.
    return [{k: v.encode(errors="replace").decode() for k, v in m.items()} for m in messages]


def _prompt(prompt: ChatPrompt, where: str = "") -> Prompt:
    messages = as_messages(prompt)
    return Prompt(transcript(messages) + ASSISTANT, {"messages": messages}, where)


def _set(text: str) -> str:
    """The set that a synthetic prompt belongs to."""
    return _SETS[derived_seed("synthetic_set", text) % len(_SETS)]
