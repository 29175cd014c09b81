"""Expansion of ``~`` in paths, checks of directories, and locks on them."""

import fcntl
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from tre_lightning.common.distributed import is_first_process

_HOME = re.compile(r"~[\w.-]*(/|$)")
_held: set[Path] = set()  # lock files of this process


def expanded(value: Any) -> Any:
    """The value with ``~`` and ``~user`` expanded at the start of every text in it.

    It looks into containers: an option that is not known here may be a path too. Shells do this for
    words that start with a tilde, but not after ``--option=`` or in a file.
    """
    return changed(value, lambda x: os.path.expanduser(x) if _is_in_home(x) else x)


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with ``change`` applied to every leaf; namespaces are changed in place."""
    if isinstance(value, Namespace):
        for key, part in list(vars(value).items()):
            setattr(value, key, changed(part, change))
        return value
    if isinstance(value, dict):
        return {key: changed(part, change) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(changed(part, change) for part in value)
    return change(value)


def _is_in_home(value: Any) -> bool:
    return isinstance(value, str) and _HOME.match(value) is not None


def check_directory(field: str, given: str) -> None:
    """Raise ValueError unless the directory exists or can be made, and is writable."""
    there = Path(given).absolute()
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{field}={given}: {there} is no directory; give another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{field}={given}: {there} cannot be written to; give another path")


def is_locked_here(directory: str | Path) -> bool:
    """Whether this process holds the lock of the directory."""
    return _lock_file(Path(directory), beside=False) in _held


@contextmanager
def locked(directory: str | Path, *, beside: bool = False, wait: bool = False) -> Iterator[None]:
    """Lock a directory against other processes, until the block or this process ends.

    Of a run with several processes the first one does so for all. Where the file system knows no
    locks, a line says so.

    Args:
        directory: made where it is not there, and then removed if nothing was written to it.
        beside: the directory is not to be there yet: lock beside it.
        wait: wait for the other process's end.

    Raises:
        ValueError: if another process holds it and ``wait`` is False.
    """
    path = _lock_file(Path(directory), beside)
    if not is_first_process():
        yield
        return
    made = not path.parent.exists()
    file = _lock(path, str(directory), wait)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        with suppress(OSError):
            path.unlink()
            if made:
                path.parent.rmdir()  # fails unless it is empty
        os.close(file)


def _lock_file(directory: Path, beside: bool) -> Path:
    directory = directory.absolute()
    return directory.with_name(directory.name + ".lock") if beside else directory / "lock"


def _lock(path: Path, directory: str, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ValueError(
                        f"another process is at work in {directory}; wait for its end, stop it or "
                        "give another directory"
                    ) from None
                print(f"waiting for another process at work in {directory}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"warning: {path} cannot be locked ({error.strerror})", file=sys.stderr)
            return file
        except BaseException:
            os.close(file)
            raise
        # The process that held it before has removed the file.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)
