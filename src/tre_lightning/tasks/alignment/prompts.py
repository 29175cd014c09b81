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
    chosen_prompt,
    read_pair,
    synthetic_pair,
    synthetic_prompt,
    synthetic_vocabulary,
)
from tre_lightning.tasks.alignment.remote import Protocol, RemoteScorer, only_message
from tre_lightning.tasks.alignment.scorer import Dtype, PreferenceScorer, RewardModelScorer
from tre_lightning.tasks.base import Prompt, PromptDataModule
from tre_lightning.tasks.sources import Source, read_rows, row_order, warn_of_unscorable

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
        url: address of a reward server.
        protocol: what the server at ``url`` speaks: ``scores`` (ours), ``predict`` (that of the
            authors of TRE) or ``openrlhf``; tre_lightning.tasks.alignment.remote has them.
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
    protocol: Protocol = "scores"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            raise ValueError(
                "give exactly one of data.reward.model (a directory or hub name) and "
                f"data.reward.url, not model={self.model}, url={self.url}"
            )
        if self.url is not None:
            self.scorer()
        elif self.protocol != "scores":
            raise ValueError(
                f"data.reward.protocol={self.protocol} is that of a server; give data.reward.url "
                "instead of data.reward.model"
            )

    def scorer(self) -> PreferenceScorer:
        """The scorer; a model's weights are loaded when they are first needed.

        Raises:
            ValueError: if an option cannot work, or there is no such model.
        """
        if self.url is not None:
            return RemoteScorer(
                self.url, self.timeout_s, self.retries, self.batch_size, protocol=self.protocol
            )
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
        val_size: int | None = 256,
        test_size: int = 512,
        train_name: str | None = None,
        eval_name: str | None = None,
        exclude_name: str | None = None,
        shuffle_seed: int | None = None,
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
            val_size: validation prompts; none = the test prompts.
            test_size: test prompts (paper: 5000).
            train_name: configuration of ``train_file`` where it is a dataset of the hub that has
                several.
            eval_name: configuration of ``eval_file``.
            exclude_name: configuration of ``exclude_file``.
            shuffle_seed: cut the sets from the rows of ``train_file`` in the order of the datasets
                library's ``shuffle(seed=shuffle_seed)``, as the authors of TRE do (42): the first
                ``train_size`` train, the next ``test_size`` test, the ``val_size`` after them
                validate. None = from its different prompts, in an order of ``seed``.
            kwargs: options of :class:`PromptDataModule`; ``long_prompts: drop`` leaves long prompts
                out before the sizes are cut.
        """
        super().__init__(**kwargs)
        sizes = {"train": train_size, "val": val_size, "test": test_size}
        for stage, size in sizes.items():
            if size is not None:
                at_least(f"data.{stage}_size", size, 1)
        named = {"eval_file": eval_file, "exclude_file": exclude_file, "train_size": train_size}
        for name, given in {**named, "shuffle_seed": shuffle_seed}.items():
            if train_file is None and given is not None:
                raise ValueError(
                    f"data.{name}={given} needs data.train_file: the synthetic prompts are not of "
                    "a file, and without end"
                )
        if shuffle_seed is not None and (train_size is None or eval_file is not None):
            raise ValueError(
                f"data.shuffle_seed={shuffle_seed} cuts every set from the rows of data.train_file;"
                " give data.train_size, and leave out data.eval_file"
            )
        self.reward = reward
        self.files = {
            "train_file": Source(train_file, train_split, train_name),
            "eval_file": Source(eval_file, eval_split, eval_name),
            "exclude_file": Source(exclude_file, exclude_split, exclude_name),
        }
        self.sizes = sizes
        self.shuffle_seed = shuffle_seed
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
            read = self._read_files if self.shuffle_seed is None else self._read_rows
            self._from_files = read()
        super().check(tokenizer)
        if self.reward.protocol == "predict":
            held_out = [p for stage in ("val", "test") for p in self.heldout_prompts(stage)[stage]]
            for prompt in [*self._from_files.get("train", []), *held_out]:
                try:
                    only_message(prompt.extra["messages"])
                except ValueError as error:
                    raise ValueError(f"{prompt.where or 'a prompt'}: {error}") from error
        first = self.train_prompt(0)
        self._ask([first.extra["messages"]], [self.render(first)], ["a response to try the scorer"])

    def train_prompt(self, index: int) -> Prompt:
        """Prompt number ``index`` of the training stream; files are shuffled anew every pass."""
        if self.synthetic:
            return _prompt(synthetic_prompt(self._synthetic(index), self.seed))
        return self.shuffled(self._from_files["train"], index)

    def heldout_prompts(self, stage: str) -> dict[str, list[Prompt]]:
        """The validation prompts as ``val`` or the test prompts as ``test``."""
        source = "test" if self.sizes[stage] is None else stage
        return {stage: self._distinct(source) if self.synthetic else self._from_files[source]}

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
        if isinstance(self.scorer, RewardModelScorer):
            self.scorer.to(prompts.prompt_ids.device)
        messages = [extra["messages"] for extra in prompts.extras for _ in range(n)]
        texts = [text for text in prompts.texts for _ in range(n)]
        return torch.tensor(self._ask(messages, texts, responses), dtype=torch.float32)

    def _ask(
        self, messages: Sequence[Messages], texts: Sequence[str], responses: Sequence[str]
    ) -> list[float]:
        """Scores of responses to prompts: their messages, and their texts as the policy reads."""
        if self.reward.protocol == "openrlhf":
            end = str(self._known.eos_token)
            return self.scorer.score(texts, [response + end for response in responses])
        return self.scorer.score(messages, responses)

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
            if self.sizes[stage] is not None:
                sets[stage], rest = self._cut(stage, source, rest)
        sets["train"], _ = self._cut(
            "train", "train_file", rest if source == "train_file" else train
        )
        return sets

    def _read_rows(self) -> dict[str, list[Prompt]]:
        """Training, test and validation prompts by the places of their rows.

        Nothing is left out before the sets are cut, so that they are those of everybody who cuts
        the same rows; then prompts that are held out, excluded or too long are.
        """
        rows = self._rows("train_file")
        rest = [rows[i] for i in row_order(len(rows), self.shuffle_seed)]
        excluded = self._load("exclude_file")
        self.excluded = sum(_key(prompt) in excluded for prompt in rest)
        found: dict[str, list[Prompt]] = {}
        for stage in ("train", "test", "val"):
            if self.sizes[stage] is not None:
                found[stage], rest = self._cut(stage, "train_file", rest)
        held_out = {_key(p) for stage in ("test", "val") for p in found.get(stage, [])}
        sets: dict[str, list[Prompt]] = {}
        for stage, prompts in found.items():
            seen = excluded.keys() | (held_out if stage == "train" else set())
            sets[stage] = [prompt for prompt in prompts if _key(prompt) not in seen]
            if len(sets[stage]) < len(prompts):
                _log.warning(
                    "left out %d of %d %s prompts that are held out or excluded too",
                    *(len(prompts) - len(sets[stage]), len(prompts), stage),
                )
            if not sets[stage]:
                raise ValueError(
                    f"data.train_file={self.files['train_file'][0]}: all {len(prompts)} {stage} "
                    "prompts are held out or excluded; give other files"
                )
            if self.long_prompts == "drop":
                sets[stage] = self.fitting(f"train_file ({stage})", sets[stage])
        return sets

    def _load(self, name: str) -> dict[str, Prompt]:
        """The different prompts of a file by their content."""
        if self.files[name][0] is None:
            return {}
        prompts: dict[str, Prompt] = {}
        for prompt in self._rows(name):
            prompts.setdefault(_key(prompt), prompt)
        return prompts

    def _rows(self, name: str) -> list[Prompt]:
        """The prompts of a file, row by row; with ``shuffle_seed`` those of equal pairs too."""
        source, split, configuration = self.files[name]
        assert source is not None
        prompts: list[Prompt] = []
        blank: list[str] = []
        total = 0
        for where, row in read_rows(f"data.{name}", source, split, configuration):
            total += 1
            messages = read_prompt(row, where, every_row=self.shuffle_seed is not None)
            if messages is None:
                continue
            if not messages[-1]["content"].strip():
                blank.append(f"{where}: the last message is empty")
            prompts.append(_prompt(messages, where))
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


def read_prompt(row: Mapping[str, Any], where: str, *, every_row: bool = False) -> Messages | None:
    """The prompt in a row of one of the forms above; None = a pair without a difference.

    Args:
        row: the row.
        where: its place, for error messages.
        every_row: give the prompt of such a pair too, and not look at the worse response.

    Raises:
        ValueError: if the row has none of these forms; the message starts with ``where``.
    """
    if "chosen" in row and every_row:
        messages = chosen_prompt(row, where)
    elif "chosen" in row:
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


def _key(prompt: Prompt) -> str:
    """The prompt's content, equal for equal prompts."""
    return json.dumps(prompt.extra["messages"])


def _set(text: str) -> str:
    """The set that a synthetic prompt belongs to."""
    return _SETS[derived_seed("synthetic_set", text) % len(_SETS)]
