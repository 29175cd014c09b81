"""Chat messages: prompts as messages, and messages as the text that a model reads."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]  # each with role and content
ChatPrompt = str | Sequence[Mapping[str, str]]  # a text, or messages

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARK = "\ue123"  # a character without a meaning
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_ROLES = {"Human": "user", "Assistant": "assistant"}


def as_messages(prompt: ChatPrompt, field: str = "prompt") -> Messages:
    r"""A prompt as messages with ``role`` and ``content``.

    A text that starts with ``\n\nHuman:`` is a transcript and is split into its turns, a last
    empty ``\n\nAssistant:`` left out. Any other text is one message of the user.

    Args:
        prompt: text or messages.
        field: what an error message calls it.

    Raises:
        ValueError: if it is neither text nor a list of at least one such message.
    """
    if isinstance(prompt, str):
        if not prompt.startswith(HUMAN):
            return [{"role": "user", "content": prompt}]
        _, *parts = re.split(r"\n\n(Human|Assistant):", prompt)
        turns = zip(parts[::2], parts[1::2], strict=True)
        messages = [{"role": _ROLES[who], "content": text.strip()} for who, text in turns]
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()
        return messages
    given: object = prompt
    if not (isinstance(given, Sequence) and given and all(map(_is_message, given))):
        raise ValueError(
            f"{field}={repr(prompt)[:80]} is neither text nor messages; give a string or a list "
            'of at least one {"role": ..., "content": ...}, both strings'
        )
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def transcript(messages: Messages) -> str:
    """Messages in the format of Anthropic's HH data, white space around them stripped."""
    return "".join(
        f"\n\n{_SPEAKERS.get(m['role'], m['role'].capitalize())}: {m['content'].strip()}"
        for m in messages
    )


def in_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    whose: str,
    *,
    ask: bool = False,
    default_system: bool = True,
) -> str:
    """Messages rendered by the tokenizer's chat template, which must exist.

    Args:
        tokenizer: has the template.
        messages: what it is filled with.
        whose: the tokenizer's model, for the error message.
        ask: begin the assistant's next message.
        default_system: where the messages have no system message, keep the one that the template
            may write by itself.

    Raises:
        ValueError: if the template refuses them, or cannot do without a system message.
    """
    if not default_system and messages[0]["role"] != "system":
        return _without_system(tokenizer, messages, whose, ask=ask)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template may raise anything
        roles = " ".join(message["role"] for message in messages)
        raise ValueError(
            f"the {whose}'s chat template refuses messages of the roles {roles} "
            f"({type(error).__name__}: {str(error)[:100]}); change the prompts"
        ) from error
    assert isinstance(text, str)
    return text


def _without_system(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, whose: str, *, ask: bool
) -> str:
    """Messages in the template, without a system message that it writes by itself.

    Templates say nowhere what theirs is. So a system message of ours is rendered, alone and before
    the messages; what follows it is what is wanted.
    """
    plain = in_template(tokenizer, messages, whose, ask=ask)
    ours = [{"role": "system", "content": _MARK}]
    try:
        whole = in_template(tokenizer, [*ours, *messages], whose, ask=ask)
        empty = in_template(
            tokenizer, [{"role": "system", "content": ""}, *messages], whose, ask=ask
        )
    except ValueError:  # it knows no system message, and writes none
        return plain
    with suppress(ValueError):  # it may want a message of the user
        head = in_template(tokenizer, ours, whose)
        if _MARK in head and whole.startswith(head):
            rest = whole[len(head) :]
            if plain.endswith(rest) and head.startswith(plain.removesuffix(rest)):
                return plain  # what it writes before them it writes before any message
            begin = tokenizer.bos_token or ""
            begins = head.startswith(begin) and not rest.startswith(begin)
            return begin + rest if begins else rest
    if len(plain) <= len(empty):  # not even an empty one
        return plain
    raise ValueError(
        f"the {whose}'s chat template writes a system message of its own, which cannot be left out"
    )
