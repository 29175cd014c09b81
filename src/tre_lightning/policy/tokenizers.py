"""Tokenizers: load one, build one from words, check that one fits a model."""

from collections.abc import Iterable, Sequence
from tempfile import TemporaryDirectory
from typing import cast

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tre_lightning.common.errors import Refused

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def word_tokenizer(words: Sequence[str], config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A tokenizer of whitespace-separated words with exactly the model's ``vocab_size`` ids.

    The ids that no word needs are ``<unused...>`` words: they can be sampled, as the rare tokens of
    a real vocabulary can, and so give a tiny policy a real tail.

    Raises:
        ValueError: if the words do not fit into ``vocab_size``, or transformers would load another
            tokenizer from a directory of this kind of model (it does for qwen2).
    """
    vocabulary = list(dict.fromkeys([*SPECIAL.values(), *words]))
    size = int(config.vocab_size)
    if len(vocabulary) > size:
        raise ValueError(
            f"model.policy.architecture.vocab_size={size} is too small for the task's "
            f"{len(vocabulary)} words; raise it"
        )
    vocabulary += [f"<unused{i}>" for i in range(size - len(vocabulary))]
    model = WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL["unk_token"]
    )
    core = Tokenizer(model)
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **SPECIAL)
    with TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        text = " ".join(words)
        reloaded = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    if reloaded != tokenizer(text)["input_ids"]:
        raise ValueError(
            f"model.policy.architecture.model_type={config.model_type} makes transformers load a "
            "tokenizer of its own from the saved model; use another, for example qwen3"
        )
    return tokenizer


def check_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    size: int | None,
    name: str,
    needed: Sequence[str] = ("eos_token", "pad_token"),
) -> None:
    """Refuse a tokenizer without a special token that is needed, or with one the model lacks.

    Args:
        tokenizer: as it is used, with a pad token where it has an end token.
        size: tokens that the model knows; None = not known.
        name: the option that names the tokenizer, and its value.
        needed: the special tokens that are used.

    Raises:
        Refused: naming the token and the fix.
    """
    for kind in needed:
        number = getattr(tokenizer, f"{kind}_id")
        if number is None:
            raise Refused(f"{name} has no {kind}; set {kind} in its tokenizer_config.json")
        check_known([number], tokenizer, size, f"{name}: its {kind}")


def check_known(
    ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, size: int | None, what: str
) -> None:
    """Refuse ids outside a model's embedding table; ``what`` names where they come from.

    Raises:
        Refused: naming the token and the fix.
    """
    largest = max(ids, default=0)
    if size is not None and largest >= size:
        raise Refused(
            f"{what} {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, and the "
            f"model knows {size} tokens (0 to {size - 1}); give a tokenizer that fits the model, "
            "or save the model after model.resize_token_embeddings(len(tokenizer))"
        )


def check_same_words(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse another model, ``name``, whose tokenizer gives a common token another id.

    Raises:
        Refused: naming the token and the fix.
    """
    theirs = other.get_vocab()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token, number) != number:
            raise Refused(
                f"{name} reads other ids than the policy: {token!r} is {theirs[token]} there and "
                f"{number} here; give a model with the policy's tokenizer"
            )


def unknown_word(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The first word of a text that the tokenizer does not know; None = none.

    The unknown token itself is known: a text or a chat template may write it out, and the tokenizer
    may put it around a text where it stands for begin and end too (as GPT-2's does).
    """
    if not tokenizer.is_fast:  # there are no places in the text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        written = text.count(str(tokenizer.unk_token))
        return text[:80] if ids.count(tokenizer.unk_token_id) > written else None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        word = text[start:end].strip()
        if number == tokenizer.unk_token_id and word not in ("", tokenizer.unk_token):
            return word
    return None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, padding on the left, with a pad token."""
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: those of the model's generation settings and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """Rows of a model's embedding table; None = its configuration does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None
