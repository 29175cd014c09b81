"""Tokenization of prompts, demonstrations and pairs, all in this one place.

Control tokens (end of a turn, begin of a text, padding, ...) come from the chat template and the
tokenizer alone: one that is written in a prompt or a response stays text, as nobody may end a turn
by writing ``<|im_end|>``.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tre_lightning.policy.chat import Messages, in_template

_PRIVATE_USE = range(0xE000, 0xF8FF)  # characters without a meaning: one of them marks a break
_TAG = re.compile(r"</?[A-Za-z]\w*>")
_REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class Conversation(NamedTuple):
    """A model's input: the messages in its chat template, or the text if it has no template.

    ``prefix`` begins the next message; without ``default_system`` a system message that the
    template writes by itself is left out.
    """

    messages: Messages
    text: str
    prefix: str = ""
    default_system: bool = True

    def rendered(self, tokenizer: PreTrainedTokenizerBase, whose: str, *, ask: bool) -> str:
        """The input as text, without what the tokenizer itself puts before a text.

        Raises:
            ValueError: if the chat template refuses the messages.
        """
        if tokenizer.chat_template is None:
            return self.text + self.prefix
        options = {"ask": ask, "default_system": self.default_system}
        return in_template(tokenizer, self.messages, whose, **options) + self.prefix


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    whose: str,
    *,
    ask: bool,
    own: str = "",
) -> list[list[int]]:
    """Token ids of each conversation.

    A chat template writes its special tokens itself. Without one the text begins with the special
    tokens that the tokenizer puts at the start (as of BOS); what it puts at the end is left out.

    Args:
        tokenizer: has the chat template, if there is one.
        conversations: what is encoded; control tokens that are written in it stay text.
        whose: the tokenizer's model, for error messages.
        ask: begin the assistant's next message.
        own: a text whose special tokens the program itself writes: they stay tokens.

    Raises:
        ValueError: if the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        before, _ = tokens_around(tokenizer)
        texts = [each.rendered(tokenizer, whose, ask=ask) for each in conversations]
        return [[*before, *ids] for ids in encode_texts(tokenizer, texts, own=own)]
    forbidden = {token: i for token, i in control_tokens(tokenizer).items() if token not in own}
    given = [
        [each.prefix, *(v for m in each.messages for v in m.values())] for each in conversations
    ]
    hostile = _hostile(tokenizer, dict.fromkeys(chain.from_iterable(given)), forbidden)
    rendered = [_valid(each.rendered(tokenizer, whose, ask=ask)) for each in conversations]
    encoded = _plain_ids(tokenizer, rendered)
    for row, conversation in enumerate(conversations):
        if hostile.keys().isdisjoint(given[row]):
            continue
        mark = _unused_character("".join([rendered[row], *given[row]]))

        def broken(text: str, mark: str = mark) -> str:
            return _broken(text, forbidden, mark, hostile.get(text, False))

        harmless = conversation._replace(
            messages=[{k: broken(v) for k, v in m.items()} for m in conversation.messages],
            prefix=broken(conversation.prefix),
        )
        text = _valid(harmless.rendered(tokenizer, whose, ask=ask))
        encoded[row] = _joined_ids(tokenizer, text.split(mark))
    return encoded


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, own: str = ""
) -> list[list[int]]:
    """Token ids of each text, without special tokens; the name of one in a text stays text.

    Args:
        tokenizer: of the model.
        texts: what is encoded.
        own: as of :func:`encode_conversations`.
    """
    texts = [_valid(text) for text in texts]
    forbidden = {token: i for token, i in control_tokens(tokenizer).items() if token not in own}
    encoded = _plain_ids(tokenizer, texts)
    for text, by_character in _hostile(tokenizer, texts, forbidden, encoded).items():
        mark = _unused_character(text)
        pieces = _broken(text, forbidden, mark, by_character).split(mark)
        ids = _joined_ids(tokenizer, pieces)
        for row in (row for row, other in enumerate(texts) if other == text):
            encoded[row] = ids
    return encoded


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a plain text."""
    sample = "Count to 3"
    bare = tokenizer(sample, add_special_tokens=False)["input_ids"]
    whole = cast(list[int], tokenizer(sample)["input_ids"])
    most = len(whole) - len(bare)
    fitting = (start for start in range(most, -1, -1) if whole[start:][: len(bare)] == bare)
    start = next(fitting, most)
    return whole[:start], whole[start + len(bare) :]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Names and ids of control tokens: special ones, and those that the chat template writes."""
    state = (tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer))
    return _control_tokens(tokenizer, repr(state))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, state: str) -> dict[str, int]:
    """``state`` is only a cache key: a changed tokenizer is looked at again."""
    written = _written_by_template(tokenizer)
    found = {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in written
    }
    found |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token: i for token, i in found.items() if len(token) > 1 and not token.isspace()}


def textless_tokens(tokenizer: PreTrainedTokenizerBase, own: str = "") -> list[int]:
    """Ids that stand for no text: control tokens, and those that only pad the vocabulary.

    Special tokens that are a part of what a model writes do stand for one: those of ``own``, as of
    :func:`encode_conversations`, those that tag thought and answer, and all others of the form
    ``<word>`` that neither the tokenizer names for a purpose nor the chat template writes.
    """
    vocabulary = tokenizer.get_vocab()
    textless = {i for word, i in vocabulary.items() if word.startswith("<unused")}
    textless |= {*range(len(tokenizer))} - {*vocabulary.values()}  # of no token at all
    purpose = " ".join([*tokenizer.special_tokens_map.values(), _written_by_template(tokenizer)])
    for token, i in control_tokens(tokenizer).items():
        tag = _TAG.fullmatch(token) and token not in purpose
        if not (tag or token in own or token in _REASONING_TAGS):
            textless.add(i)
    return sorted(textless)


def pad(
    rows: Sequence[Sequence[int] | Tensor],
    pad_token_id: int,
    side: Literal["left", "right"] = "right",
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (both int64), ``[B, T]``.

    Sequence classifiers of transformers take the score at the last token that is not
    ``pad_token_id``, so it must be the one of their configuration; then padding changes nothing,
    also where it is the end token, which just is never the one that counts.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[number, place] = torch.as_tensor(row, dtype=torch.int64)
        mask[number, place] = 1
    return ids, mask


def _written_by_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the chat template writes around messages; empty without a template."""
    if tokenizer.chat_template is None:
        return ""
    texts = []
    for roles in (["user"], ["system", "user", "assistant", "user"]):
        with suppress(ValueError):  # a template may refuse the roles
            messages = [{"role": role, "content": "x"} for role in roles]
            texts.append(in_template(tokenizer, messages, "policy", ask=True))
    return " ".join(texts)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return cast(list[list[int]], encoded)


def _hostile(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    forbidden: dict[str, int],
    encoded: Sequence[list[int]] | None = None,
) -> dict[str, bool]:
    """The texts in which the tokenizer would read control tokens.

    The values say whether it does so even where the tokens' names are broken up (it may take other
    characters for them): such a text is to be encoded by the character.
    """
    texts = list(texts)
    if encoded is None:
        encoded = _plain_ids(tokenizer, [_valid(text) for text in texts])
    # A word that the tokenizer does not know is no control token.
    ids = {i for token, i in forbidden.items() if token != tokenizer.unk_token}
    found = {}
    for text, row in zip(texts, encoded, strict=True):
        unknown = str(tokenizer.unk_token) in text and tokenizer.unk_token in forbidden
        if unknown or not ids.isdisjoint(row):
            mark = _unused_character(text)
            pieces = _broken(text, forbidden, mark, False).split(mark)
            found[text] = not ids.isdisjoint(_joined_ids(tokenizer, pieces))
    return found


def _broken(text: str, forbidden: Iterable[str], mark: str, by_character: bool) -> str:
    """The text with a mark inside every name of a control token."""
    text = _valid(text)
    if by_character:
        return mark.join(text)
    names = "|".join(map(re.escape, forbidden))
    return re.sub(f"(?=(?:{names}))(.)", rf"\1{mark}", text, flags=re.DOTALL) if names else text


def _joined_ids(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[int]:
    """Ids of the pieces of a text, each encoded alone."""
    # Some tokenizers read a space that is not there at the start of a text, but none after "\n".
    line = _plain_ids(tokenizer, ["\n"])[0]
    first, *others = _plain_ids(tokenizer, [pieces[0], *(f"\n{piece}" for piece in pieces[1:])])
    for piece, ids in zip(pieces[1:], others, strict=True):
        if ids[: len(line)] == line:
            first += ids[len(line) :]
        else:
            first += _plain_ids(tokenizer, [piece])[0]
    return first


def _unused_character(text: str) -> str:
    return next(c for c in map(chr, _PRIVATE_USE) if c not in text)


def _valid(text: str) -> str:
    """Without lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()
