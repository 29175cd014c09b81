r"""The answers in a response: contents of ``\boxed`` and ``\fbox``, in linear time."""

import re
from collections import deque
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed ``\boxed{...}`` or ``\fbox{...}``, None if there is none.

    Of nested boxes the outer one is the last to close. Escaped braces do not count. Linear time.
    """
    last = deque(_boxes(text), maxlen=1)
    return text[slice(*last[0])] if last else None


def boxed_answers(text: str) -> list[str]:
    r"""Contents of all closed ``\boxed{...}`` and ``\fbox{...}``, of nested ones the outermost."""
    outer: list[tuple[int, int]] = []
    for start, stop in _boxes(text):
        while outer and outer[-1][0] > start:
            outer.pop()
        outer.append((start, stop))
    return [text[start:stop] for start, stop in outer]


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Where the content of each closed box starts and stops, in the order of closing."""
    starts = [i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0]
    if not starts:
        return
    start = min(starts)
    while start and text[start - 1] == "\\":  # an escaped backslash starts no command
        start -= 1
    opened: list[int | None] = []  # for each open brace where its box begins, if it is a box's
    for token in _BOX.finditer(text, start):
        if token[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                yield begin, token.start()
        elif token[0] == "{":
            opened.append(None)
        elif len(token[0]) > 2:
            opened.append(token.end())
