r"""Preference pairs: a chosen and a rejected response, to train a reward model on.

A row of a file or of a dataset of the hub has one of these forms; other columns are ignored:

* ``prompt`` (a string, or a list of ``{"role": ..., "content": ...}``), ``chosen`` and
  ``rejected`` (strings), and optionally ``margin``, by how much the scores should differ at least;
* ``chosen`` and ``rejected`` as lists of messages that differ in the last one, the response, as in
  UltraFeedback-binarized; only where they hold the response alone, ``prompt`` counts;
* ``chosen`` and ``rejected`` as whole transcripts that start with ``\n\nHuman:``, as in
  Anthropic's HH data; the response follows the last ``\n\nAssistant:``.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.common.seeding import derived_seed, permutation
from tre_lightning.common.validation import at_least
from tre_lightning.policy.chat import ASSISTANT, HUMAN, ChatPrompt, as_messages
from tre_lightning.policy.encoding import pad
from tre_lightning.policy.tokenizers import check_known
from tre_lightning.tasks.alignment.scorer import encode
from tre_lightning.tasks.batching import share, spans
from tre_lightning.tasks.sources import read_rows, row_order

_ENCODED_AT_ONCE = 1024  # pairs
_log = logging.getLogger(__name__)

_ASKS = ("please explain", "tell me about", "what do you know of", "i wonder about")
_KINDS = ("old", "new", "red", "blue", "small", "large", "local", "famous")
_TOPICS = (
    *("bread", "rain", "trains", "gardens", "music", "rivers", "clocks", "horses"),
    *("bridges", "coffee", "stars", "boats", "markets", "winter", "chess", "islands"),
)
_WHENS = ("today", "briefly", "now", "again", "first", "for a friend")
_LEADS = ("well ,", "so ,", "sure ,", "look ,")
_FACTS = ("are useful", "take time", "come in many forms", "are older than you think")
_COURTEOUS = ("thanks", "welcome", "gladly", "cheers")
_RUDE = ("whatever", "nonsense", "boring", "stupid")


@dataclass(frozen=True)
class Pair:
    """A preference pair: two responses to a prompt, the better one first."""

    prompt: ChatPrompt
    chosen: str
    rejected: str
    margin: float = 0.0  # by how much the scores should differ at least


class PairBatch(NamedTuple):
    """B pairs of this rank: the first B rows are the chosen texts, the next B the rejected."""

    input_ids: Tensor  # [2B, T] int64, padded on the right
    attention_mask: Tensor  # [2B, T] int64, 1 = a real token
    margin: Tensor  # [B] float32
    total_pairs: int  # over all ranks


class _Encoded(NamedTuple):
    chosen: Tensor  # [T] int32, a fraction of the memory of a list
    rejected: Tensor
    margin: float


# ----- synthetic pairs


def synthetic_prompt(index: int, seed: int) -> str:
    r"""Prompt number ``index`` of an endless stream, ``\n\nHuman: ...\n\nAssistant:``."""
    rng = random.Random(derived_seed("synthetic_prompt", seed, index))
    words = [_pick(rng, options) for options in (_ASKS, _KINDS, _TOPICS, _WHENS)]
    return f"{HUMAN} {' '.join(words)}{ASSISTANT}"


def synthetic_pair(index: int, seed: int) -> Pair:
    """Pair number ``index`` of an endless stream, its prompt that of :func:`synthetic_prompt`.

    The better response names the prompt's topic and ends with a courtesy word; the worse one, in
    equal numbers, names another topic, or ends rudely, or both.
    """
    prompt = synthetic_prompt(index, seed)
    topic = next(word for word in prompt.split() if word in _TOPICS)
    rng = random.Random(derived_seed("synthetic_pair", seed, index))
    fault = _pick(rng, ("topic", "tone", "both"))
    other = _pick(rng, [name for name in _TOPICS if name != topic])
    chosen = _synthetic_response(rng, topic, _COURTEOUS)
    rejected = _synthetic_response(
        rng, topic if fault == "tone" else other, _COURTEOUS if fault == "topic" else _RUDE
    )
    return Pair(prompt, chosen, rejected)


def synthetic_vocabulary() -> list[str]:
    """Every word of the synthetic prompts and responses."""
    groups = (_ASKS, _KINDS, _TOPICS, _WHENS, _LEADS, _FACTS, _COURTEOUS, _RUDE)
    words = [HUMAN.strip(), ASSISTANT.strip()]
    words += [word for group in groups for phrase in group for word in phrase.split()]
    return list(dict.fromkeys(words))


def _synthetic_response(rng: random.Random, topic: str, endings: Sequence[str]) -> str:
    return f"{_pick(rng, _LEADS)} {topic} {_pick(rng, _FACTS)} , {_pick(rng, endings)}"


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    # random() is the one method whose sequence Python promises to keep across versions.
    return options[int(rng.random() * len(options))]


# ----- pairs from files and datasets


def load_pairs(
    source: str,
    split: str = "train",
    name: str | None = None,
    *,
    shuffle_seed: int | None = None,
    skip_rows: int = 0,
) -> list[Pair]:
    """Pairs of a local ``.jsonl`` or ``.parquet`` file, or of a dataset of the hub.

    Rows without a difference to learn (equal responses, or transcripts that differ before the last
    response) are left out and their number is logged.

    Args:
        source: the file or dataset.
        split: split of a dataset of the hub.
        name: configuration of a dataset of the hub that has several.
        shuffle_seed: of the order of the rows, as of :func:`row_order`.
        skip_rows: the first rows in that order are left out, and every other pair of their prompts.

    Raises:
        ValueError: if the source cannot be read, a row has none of the known forms, or no row is
            left.
    """
    rows = [*read_rows("data.source", source, split, name)]
    order = row_order(len(rows), shuffle_seed)
    hidden = {_key(chosen_prompt(rows[i][1], rows[i][0])) for i in order[:skip_rows]}
    pairs, dropped = [], 0
    for i in order[skip_rows:]:
        pair = read_pair(rows[i][1], rows[i][0])
        if pair is None:
            dropped += 1
        elif _key(pair.prompt) not in hidden:
            pairs.append(pair)
    if dropped:
        _log.warning("%s: left out %d pairs that differ in no last response", source, dropped)
    if skip_rows:
        others = len(rows) - skip_rows - dropped - len(pairs)
        _log.warning(
            "%s: left out the first %d rows, and %d others of the same prompts",
            *(source, min(skip_rows, len(rows)), max(others, 0)),
        )
    if not pairs:
        raise ValueError(f"data.source={source} holds no pair with two different responses")
    return pairs


def read_pair(row: Mapping[str, Any], where: str) -> Pair | None:
    """The pair in a row of one of the forms above; None = both responses are equal.

    Raises:
        ValueError: if the row has none of these forms; the message starts with ``where``.
    """
    try:
        prompt, chosen = _read_side(row, "chosen")
        other_prompt, rejected = _read_side(row, "rejected")
        margin = _read_margin(row.get("margin"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if prompt != other_prompt or chosen == rejected:
        return None
    return Pair(prompt, chosen, rejected, margin)


def chosen_prompt(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The prompt of the better response, whatever the other one is.

    Raises:
        ValueError: if the row has none of these forms; the message starts with ``where``.
    """
    try:
        return _read_side(row, "chosen")[0]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _key(prompt: ChatPrompt) -> str:
    return json.dumps(as_messages(prompt))


def _read_side(row: Mapping[str, Any], name: str) -> tuple[list[dict[str, str]], str]:
    """Prompt and response of a column."""
    value, prompt = row.get(name), row.get("prompt")
    if isinstance(value, str):
        if prompt is not None:
            return as_messages(prompt), value
        start, found, response = value.rpartition(ASSISTANT)
        if value.startswith(HUMAN) and found:
            return as_messages(start), response.strip()
        raise ValueError(
            f"{name}={value[:80]!r} has no prompt; add a prompt column, or give a transcript "
            f"{HUMAN + ' ...' + ASSISTANT + ' ...'!r}"
        )
    messages = as_messages(cast(ChatPrompt, value), name)
    last = messages.pop()
    if last["role"] != "assistant":
        raise ValueError(
            f"{name} ends with a message of the role {last['role'][:80]!r}; end it with the "
            "assistant's"
        )
    return messages or as_messages(cast(ChatPrompt, prompt)), last["content"]


def _read_margin(value: object) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"margin={str(value)[:80]!r} must be a number of at least 0, or missing")
    return float(value)


# ----- batches


class PreferencePairs(LightningDataModule):
    """Preference pairs, to train a reward model on.

    No prompt of the validation pairs occurs in the training pairs.
    """

    def __init__(
        self,
        source: str | None = None,
        split: str = "train",
        synthetic_size: int = 4096,
        batch_size: int = 64,
        max_length: int = 512,
        val_size: int = 256,
        seed: int = 42,
        name: str | None = None,
        shuffle_seed: int | None = None,
        skip_rows: int = 0,
    ) -> None:
        """Keep the options.

        Args:
            source: a .jsonl or .parquet file, or the name of a dataset of the hub; none = the
                synthetic pairs, for a model from scratch.
            split: split of a dataset of the hub.
            synthetic_size: synthetic pairs, those for validation included.
            batch_size: pairs a batch, over all devices.
            max_length: longest text (prompt and response), tokens; longer pairs are left out.
            val_size: pairs held out for validation, at least, once the too long ones are left out;
                all pairs of a prompt stay together.
            seed: of the synthetic pairs, their order and the choice of the validation pairs.
            name: configuration of a dataset of the hub that has several.
            shuffle_seed: take the rows in the order of the datasets library's
                ``shuffle(seed=shuffle_seed)``; none = as they stand. Matters to ``skip_rows``.
            skip_rows: leave out so many rows, the first ones, and every other pair of their
                prompts: those that a policy is trained and tested on.
        """
        super().__init__()
        at_least("data.skip_rows", skip_rows, 0)
        for option, given in (("shuffle_seed", shuffle_seed), ("skip_rows", skip_rows or None)):
            if source is None and given is not None:
                raise ValueError(
                    f"data.{option}={given} needs data.source: the synthetic pairs have no rows"
                )
        named = {
            "synthetic_size": synthetic_size,
            "batch_size": batch_size,
            "max_length": max_length,
            "val_size": val_size,
        }
        for option, least in named.items():
            at_least(f"data.{option}", least, 1)
        self.source = source
        self.split = split
        self.name = name
        self.shuffle_seed = shuffle_seed
        self.skip_rows = skip_rows
        self.synthetic_size = synthetic_size
        self.batch_size = batch_size
        self.max_length = max_length
        self.val_size = val_size
        self.seed = seed
        self._all: list[Pair] = []
        self.pairs: dict[str, list[Pair]] = {}  # by train and val, once they are encoded
        self._encoded: dict[str, list[_Encoded]] = {}

    def vocabulary(self) -> list[str]:
        """Words that a tokenizer from scratch needs; only for the synthetic pairs."""
        if self.source is not None:
            raise ValueError(
                f"data.source={self.source} has no closed vocabulary; give model.policy.model or "
                "model.policy.tokenizer a pretrained tokenizer"
            )
        return synthetic_vocabulary()

    def setup(self, stage: str | None = None) -> None:
        """Read or make the pairs."""
        if self._all:
            return
        if self.source is None:
            self._all = [synthetic_pair(index, self.seed) for index in range(self.synthetic_size)]
        else:
            self._all = load_pairs(
                self.source,
                self.split,
                self.name,
                shuffle_seed=self.shuffle_seed,
                skip_rows=self.skip_rows,
            )
        self._split(self._all)  # refuses what cannot work before a model is loaded

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_token_id: int,
        vocabulary_size: int | None = None,
    ) -> None:
        """Tokenize the pairs, leave out those that are too long, and hold some out.

        The module calls it.

        Raises:
            ValueError: if no pair is short enough, or none is left to train on.
        """
        self.pad_token_id = pad_token_id
        encoded = [*_encode(tokenizer, self._all)]
        fits = [max(map(len, pair[:2])) <= self.max_length for pair in encoded]
        if not all(fits):
            _log.warning(
                "left out %d of %d pairs longer than data.max_length=%d tokens",
                *(fits.count(False), len(fits), self.max_length),
            )
        if not any(fits):
            raise ValueError(
                f"data.max_length={self.max_length} is too short for all {len(fits)} pairs; "
                "raise it"
            )
        largest = (int(ids.max()) for pair in encoded for ids in pair[:2])
        check_known(largest, tokenizer, vocabulary_size, "a pair: its token")
        pairs = [pair for pair, fit in zip(self._all, fits, strict=True) if fit]
        train, val = self._split(pairs)
        ids = {id(pair): row for pair, row in zip(self._all, encoded, strict=True)}
        self.pairs = {"train": train, "val": val}
        self._encoded = {name: [ids[id(p)] for p in part] for name, part in self.pairs.items()}

    def _split(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
        train, val = split_by_prompt(pairs, self.val_size, self.seed)
        if not train:
            raise ValueError(
                f"data.val_size={self.val_size} leaves none of {len(pairs)} pairs to train on; "
                "lower it"
            )
        return train, val

    def train_dataloader(self) -> "PairLoader":
        """The training pairs, in another order every epoch."""
        trainer = self.trainer
        size = len(self._encoded["train"])

        def order() -> list[int]:
            epoch = 0 if trainer is None else trainer.current_epoch
            return permutation(size, "pairs", self.seed, epoch).tolist()

        return self._loader("train", order)

    def val_dataloader(self) -> "PairLoader":
        """The validation pairs, in their order."""
        size = len(self._encoded["val"])
        return self._loader("val", lambda: list(range(size)))

    def _loader(self, name: str, order: Callable[[], list[int]]) -> "PairLoader":
        trainer = self.trainer
        rank, ranks = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        pairs = self._encoded[name]
        if len(pairs) < ranks:
            raise ValueError(
                f"{len(pairs)} {name} pairs are too few for {ranks} devices; use fewer devices"
            )
        return PairLoader(pairs, order, self.batch_size, self.pad_token_id, rank, ranks)


class PairLoader:
    """This rank's pairs of every batch, at least one each."""

    def __init__(
        self,
        pairs: Sequence[_Encoded],
        order: Callable[[], list[int]],
        batch_size: int,
        pad_token_id: int,
        rank: int,
        ranks: int,
    ) -> None:
        """``order`` gives the rows of an epoch; ``batch_size`` is over all ranks."""
        self._pairs = pairs
        self._order = order
        self._pad_token_id = pad_token_id
        self._rank = rank
        self._ranks = ranks
        self._spans = spans(len(pairs), batch_size, ranks)

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[PairBatch]:
        order = self._order()
        for start, stop in self._spans:
            total = stop - start
            first, end = share(total, self._rank, self._ranks)
            rows = [self._pairs[i] for i in order[start + first : start + end]]
            texts = [pair.chosen for pair in rows] + [pair.rejected for pair in rows]
            ids, mask = pad(texts, self._pad_token_id)
            yield PairBatch(ids, mask, torch.tensor([pair.margin for pair in rows]), total)


def split_by_prompt(
    pairs: Sequence[Pair], val_size: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs without a common prompt, chosen by the seed.

    The validation pairs are those of random prompts, just so many that they are ``val_size`` pairs
    or more (all pairs, where there are not so many).
    """
    keys = [_key(pair.prompt) for pair in pairs]
    sizes = Counter(keys)
    prompts = list(sizes)
    held_out: set[str] = set()
    count = 0
    for place in permutation(len(prompts), "val_pairs", seed).tolist():
        if count >= val_size:
            break
        held_out.add(prompts[place])
        count += sizes[prompts[place]]
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair, key in zip(pairs, keys, strict=True):
        sides[key in held_out].append(pair)
    return sides


def _encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Iterator[_Encoded]:
    for start in range(0, len(pairs), _ENCODED_AT_ONCE):
        rows = pairs[start : start + _ENCODED_AT_ONCE]
        prompts = [pair.prompt for pair in rows]
        chosen = encode(tokenizer, prompts, [pair.chosen for pair in rows])
        rejected = encode(tokenizer, prompts, [pair.rejected for pair in rows])
        for pair, better, worse in zip(rows, chosen, rejected, strict=True):
            better_ids, worse_ids = (
                torch.tensor(ids, dtype=torch.int32) for ids in (better, worse)
            )
            yield _Encoded(better_ids, worse_ids, pair.margin)
