"""One line on stderr: exit code 2 for a mistake in the configuration, 1 for what ends a run."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Loaded = TypeVar("Loaded")

# No room for a file: of the disk, of the user's quota, or of the process's limit.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LONGEST_MESSAGE = 500  # characters
# Lines with which jsonargparse describes the other types that a value could have had.
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Given value: Namespace(",
    "Given value: NestedArg(",
    "Given value: [",
    "Given value: {",
    "Subclass types expect",
    "a class path",
    "a dict ",
    "Not a valid subclass",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Expected a dot import path",
)


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
    lines = [" ".join(line.split()).removeprefix("- ") for line in message.splitlines()]
    telling = [line for line in lines if line and not line.startswith(_NOISE)]
    joined = ""
    for line in telling or lines:
        joined += (" " if joined.endswith((":", ".", ",")) else "; ") + line if joined else line
    joined = re.sub(r"<class '([\w.]+)'>", r"\1", joined)
    short = len(joined) <= _LONGEST_MESSAGE
    return joined if short else joined[:_LONGEST_MESSAGE] + " ..."


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
