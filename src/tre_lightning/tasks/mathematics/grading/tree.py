"""Parses text to a tree: tokens in one spelling each, grouped by their delimiters."""

import re
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from tre_lightning.tasks.mathematics.grading.limits import MAX_DEPTH
from tre_lightning.tasks.mathematics.grading.vocabulary import (
    ALIAS,
    BARE_WORDS,
    FUNCTIONS,
    NUMBER_WORDS,
    SKIPPED,
    TEXT_COMMANDS,
    UNICODE,
    word_set,
)


class Unreadable(Exception):
    """The text has no known form; only the same string equals it."""


class Group(NamedTuple):
    r"""Items between two delimiters; braces are "{" and "}", set braces "\{" and "\}"."""

    open: str
    close: str
    items: "Items"


Items: TypeAlias = "tuple[str | Group, ...]"  # a token starting with " is a text, in lower case

_SCAN = re.compile(
    r"\\(?:begin|end)\s*\{[A-Za-z]+\}|\\[A-Za-z]+|\\."
    r"|[0-9]+(?:\.[0-9]+|\.(?=\s*\\(?:overline|bar)\b))?|\.[0-9]+|[A-Za-z]+|\s+|.",
    re.DOTALL,
)
_BEFORE_ARGUMENT = re.compile(r"\s*\{")
_BRACE = re.compile(r"[{}]")
_PAIRS = {
    "(": word_set(") ]"),
    "[": word_set(") ]"),
    "\\{": word_set("\\}"),
    "{": word_set("}"),
    "|": word_set("|"),
    "\\lfloor": word_set("\\rfloor"),
    "\\lceil": word_set("\\rceil"),
    **{
        f"\\begin{{{name}}}": word_set(f"\\end{{{name}}}")
        for name in ("matrix", "pmatrix", "bmatrix", "smallmatrix", "array")
    },
}
_CLOSING = frozenset(close for closes in _PAIRS.values() for close in closes)
_ARITY = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "\\bar": 1, "^": 1, "_": 1}
# Groups of three digits, all with the same separator, and no digits beside them.
_GROUPED = re.compile(
    r"(?<![0-9.,])([1-9][0-9]{0,2})(\{,\}|,|\\,|\\ |~| )([0-9]{3}(?:\2[0-9]{3})*)(?!\2?[0-9])"
)


def to_tree(text: str, thousands: bool) -> Items:
    """The text as tokens grouped by their delimiters.

    Args:
        text: LaTeX of at most `MAX_CHARS` characters.
        thousands: read ``1,234`` outside of brackets as one number, not as two.

    Raises:
        Unreadable: for delimiters that do not pair, or a command without its argument.
    """
    text = re.sub(r"\\!\s*", "", text.translate(UNICODE))
    text = _GROUPED.sub(lambda m: _join_digits(m, text, thousands), text)
    return _grouped(list(_scan(text.replace("{,}", ","))))


def _join_digits(match: re.Match[str], text: str, thousands: bool) -> str:
    before = text[: match.start()]
    inside = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    if match[2] == "," and (inside or not thousands):
        return match[0]
    return match[1] + match[3].replace(match[2], "")


def _scan(text: str) -> Iterator[str]:
    position = 0
    while match := _SCAN.match(text, position):
        token, position = match[0], match.end()
        token = ALIAS.get(token, token)
        if token in SKIPPED or token.isspace():
            if token in ("\\left", "\\right") and text[position : position + 1] == ".":
                position += 1
        elif token in TEXT_COMMANDS:
            content, position = _argument_text(text, position)
            yield from _text_tokens(content)
        elif token == "\\degree":
            yield from ("^", "\\circ")
        elif token == "\\begin{array}":
            _, position = _argument_text(text, position)
            yield token
        elif token == "\\mathbb":
            content, position = _argument_text(text, position)
            if content.strip() != "R":
                raise Unreadable
            yield from ("(", "-", "\\infty", ",", "\\infty", ")")
        elif token.isalpha():
            yield from _word_tokens(token)
        else:
            yield token


def _argument_text(text: str, position: int) -> tuple[str, int]:
    """Raw text of the brace group that comes next, and where it ends."""
    opening = _BEFORE_ARGUMENT.match(text, position)
    if opening is None:
        raise Unreadable
    depth = 1
    for brace in _BRACE.finditer(text, opening.end()):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[opening.end() : brace.start()], brace.end()
    raise Unreadable


def _text_tokens(content: str) -> Iterator[str]:
    words = " ".join(content.lower().split())
    words = words.replace("a.m.", "am").replace("p.m.", "pm")
    core = words.strip(" .,;:")
    if core in ("and", "or"):
        yield core.upper()
    elif words in (",", ";", ""):
        yield from words
    elif core in FUNCTIONS:
        yield "\\" + core
    elif core in NUMBER_WORDS:
        yield NUMBER_WORDS[core]
    elif counted := re.fullmatch(r"([0-9.,/]+) ([a-z .]+)", words):  # \text{5 square cm}
        yield from _scan(counted[1])
        yield '"' + counted[2]
    elif re.search(r"[a-z]{2}", re.sub(r"\b(?:and|or)\b", "", words)) or "\\" in words:
        yield '"' + words
    else:  # \text{(A)}, \text{B, C and D}, \mathbf{0}
        yield from _scan(content)


def _word_tokens(word: str) -> Iterator[str]:
    lower = word.lower()
    if lower in ("and", "or"):
        yield lower.upper()
    elif lower in NUMBER_WORDS:
        yield NUMBER_WORDS[lower]
    elif lower in FUNCTIONS or lower == "sqrt":
        yield "\\" + lower
    elif len(word) > 3 or word in BARE_WORDS:
        yield '"' + lower
    else:
        yield from word  # a product of letters


def _grouped(tokens: list[str]) -> Items:
    levels: list[tuple[str, list[str | Group]]] = [("", [])]
    for token in tokens:
        innermost = levels[-1][0]
        if token in _CLOSING and token in _PAIRS.get(innermost, ()):
            opening, items = levels.pop()
            levels[-1][1].append(Group(opening, token, _bound(items)))
        elif token in _PAIRS:
            if len(levels) > MAX_DEPTH:
                raise Unreadable
            levels.append((token, []))
        elif token in _CLOSING:
            raise Unreadable
        else:
            levels[-1][1].append(token)
    if len(levels) > 1:
        raise Unreadable
    return _bound(levels[0][1])


def _bound(items: list[str | Group]) -> Items:
    r"""The items with braces around each argument, and only there: ``\frac12``, ``{x}+1``."""
    bound: list[str | Group] = []
    queue = list(reversed(items))
    while queue:
        item = queue.pop()
        if isinstance(item, Group) and item.open == "{":
            bound.extend(item.items)  # nothing to be seen: 2{3} is 23 to the reader
            continue
        bound.append(item)
        for place in range(_ARITY.get(item, 0) if isinstance(item, str) else 0):
            if item == "\\sqrt" and queue and _opens(queue[-1], "["):
                bound.append(queue.pop())
            if not queue:
                raise Unreadable
            argument = queue.pop()
            if isinstance(argument, str) and argument.isdecimal() and item not in ("^", "_"):
                # TeX takes one digit. \frac12 is meant so; \sqrt12 and \frac{1}23 may not be.
                if len(argument) == 2 and place == 0 and item == "\\frac":
                    queue.append(argument[1])
                    argument = argument[0]
                elif len(argument) > 1:
                    raise Unreadable
            if not _opens(argument, "{"):
                argument = Group("{", "}", (argument,))
            bound.append(argument)
    return tuple(bound)


def _opens(item: str | Group, delimiter: str) -> bool:
    return isinstance(item, Group) and item.open == delimiter


def flat(items: Items) -> Iterator[str]:
    """The tokens, delimiters included."""
    for item in items:
        if isinstance(item, Group):
            yield item.open
            yield from flat(item.items)
            yield item.close
        else:
            yield item


def argument_items(item: str | Group) -> Items:
    """Items of an argument, which `to_tree` has put in braces."""
    return item.items if isinstance(item, Group) and item.open == "{" else (item,)


def split(items: Items, at: frozenset[str]) -> tuple[list[Items], list[str]]:
    """The items between the given tokens, and the tokens that they were split at."""
    parts: list[Items] = [()]
    marks: list[str] = []
    for item in items:
        if isinstance(item, str) and item in at:
            parts.append(())
            marks.append(item)
        else:
            parts[-1] += (item,)
    return parts, marks
