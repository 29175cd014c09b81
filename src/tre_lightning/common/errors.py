"""One line on stderr: exit code 2 for a mistake in the configuration, 1 for what ends a run."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

Loaded = TypeVar("Loaded")

# No room for a file: of the disk, of the user's quota, or of the process's limit.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LONGEST_MESSAGE = 500  # characters


class RunError(RuntimeError):
    """Ends a run that has no bug, by what its message says; ``of_all_ranks``: on each alike."""

    of_all_ranks = False


class Refused(ValueError):
    """A mistake in the configuration that shows only on the loaded model."""


class ScoreError(RunError):
    """The scorer gave an infinite score."""


class CheckpointError(RunError):
    """A checkpoint could not be written; those before it are intact."""


def disk_full(error: BaseException) -> bool:
    """Whether the error is that there is no room for a file."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


@contextmanager
def one_line_errors(hint: str = "") -> Iterator[None]:
    """Turn an error of the configuration into one line and exit code 2.

    TRE_DEBUG=1 shows the traceback instead.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("TRE_DEBUG"):
            raise
        print(f"error: {one_line(str(error))}{hint}", file=sys.stderr)
        raise SystemExit(2) from error


def one_line(message: str) -> str:
    """What matters of an error message of many lines, on one."""
    joined = ""
    for line in _deepest([line for line in message.splitlines() if line.strip()]):
        line = " ".join(line.split()).removeprefix("- ")
        joined += (" " if joined.endswith((":", ".", ",")) else "; ") + line if joined else line
    joined = re.sub(r"<class '([\w.]+)'>", r"\1", joined)
    short = len(joined) <= _LONGEST_MESSAGE
    return joined if short else joined[:_LONGEST_MESSAGE] + " ..."


def _deepest(lines: list[str]) -> list[str]:
    """Of a value that fits none of several types, what concerns the type that it fits best.

    jsonargparse lists each type's error below "Errors:", the deeper the further the value got, then
    "Given value:". Its exceptions hold the first type's alone, so there is only this text.
    """
    depths = [len(line) - len(line.lstrip()) for line in lines]
    pairs = zip(lines, pairwise(depths), strict=False)
    heads = [i for i, (line, (own, below)) in enumerate(pairs) if line[-1] == ":" and own < below]
    if not any(lines[i].strip() == "Errors:" for i in heads):
        return lines
    last = max(heads, key=depths.__getitem__)
    above = [last]
    for i in reversed(heads[: heads.index(last)]):
        if depths[i] < depths[above[0]]:
            above.insert(0, i)
    rest = range(last + 1, len(lines))
    end = next((i for i in rest if depths[i] <= depths[last]), len(lines))
    said = [i for i in range(last + 1, end) if depths[i] == depths[last + 1]]
    if lines[last].strip() == "Errors:":
        said += [i for i in range(end, len(lines)) if lines[i].strip().startswith("Given value:")][
            :1
        ]
    kept = [lines[i].strip() for i in above + said]
    return [line for line in dict.fromkeys(kept) if line != "Errors:"]


def read(field: str, name: str, load: Callable[[str], Loaded]) -> Loaded:
    """Load what ``field`` names, from a directory or the hub.

    Raises:
        ValueError: if that does not work, whatever the reason.
    """
    try:
        return load(name)
    except Exception as error:
        raise ValueError(
            f"{field}={name} could not be loaded; give a model directory, or a hub name that can "
            f"be reached from here ({type(error).__name__}: {str(error).strip()[:200]})"
        ) from error
