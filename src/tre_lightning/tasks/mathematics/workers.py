"""Worker processes for functions that may hang, exhaust memory or crash on hostile input.

Neither threads (Python cannot stop one, and signal time-outs work in the main thread only) nor a
``ProcessPoolExecutor`` (a stuck worker keeps its place, so later jobs wait) can do this. Here every
worker is a fresh interpreter, neither a fork of the trainer nor a child that imports its main
module, with a pipe of its own. The parent keeps the deadline: a worker that misses it is killed
and replaced, and no exception reaches the caller.
"""

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[2])
# -P: no module of the working directory may hide one of the standard library.
_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from tre_lightning.tasks.mathematics.workers import _serve; _serve(sys.argv[2])"
)
# gmpy2 and python-flint compute in C, where a huge power cannot be interrupted by anything.
_ENVIRONMENT = {
    "MPMATH_NOGMPY": "1",
    "SYMPY_GROUND_TYPES": "python",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
_START_SECONDS = 60.0
_MAX_FAILED_STARTS = 3
_MAX_ATTEMPTS = 2  # a worker that dies may have been killed from outside
_MAX_JOB_BYTES = 1 << 15  # below a pipe's buffer, so that writing to an idle worker never blocks


class WorkerPool:
    """Runs one function in several killable processes.

    A job is the function's positional arguments, as JSON; so is its result, which must not be
    None. Workers start on the first job or by `start`, end with the parent however that ends, and
    ignore Ctrl-C. After a fork the child starts workers of its own; a pickled pool comes back
    without any. Not for use by two threads at once.

    Args:
        function: ``"module:name"``, to be imported by the workers.
        workers: how many processes to keep.
        timeout: seconds for one job, from its sending to a ready worker.
        memory_gib: address space of a worker, in GiB.
        max_jobs: jobs after which a worker is replaced, against slow growth.
        warm_up: arguments of one call that a worker makes before its first job, so that no job
            pays for late imports.

    Attributes:
        kills: workers killed for missing the deadline, so far.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int = 2,
        timeout: float = 3.0,
        memory_gib: float = 2.0,
        max_jobs: int = 2000,
        warm_up: Sequence[Any] | None = None,
    ) -> None:
        if function.count(":") != 1:
            raise ValueError(f"function={function!r} names no function; pass 'module:name'")
        for name, value in [("workers", workers), ("max_jobs", max_jobs)]:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; pass an int of at least 1")
        for name, seconds in [("timeout", timeout), ("memory_gib", memory_gib)]:
            if not 0 < seconds < 1e6:
                raise ValueError(f"{name}={seconds!r}; pass a positive number")
        self._options = (function, workers, timeout, memory_gib, max_jobs, warm_up)
        self._reset()

    def _reset(self) -> None:
        function, self._size, self._timeout, memory_gib, self._max_jobs, warm_up = self._options
        self._spec = json.dumps(
            {
                "function": function,
                "timeout": self._timeout,
                "memory": int(memory_gib * 2**30),
                "warm_up": warm_up,
                "parent": os.getpid(),
            }
        )
        self.kills = 0
        self._workers: list[_Worker] = []
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._pid)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._options

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._options = state
        self._reset()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that this process has started."""
        return [w.process.pid for w in self._workers] if self._pid == os.getpid() else []

    def start(self) -> None:
        """Start the workers now and wait until they are ready.

        Raises:
            RuntimeError: if they do not come up, with the reason.
        """
        self._run([], want=self._size)

    def map(self, jobs: Sequence[Sequence[Any]]) -> list[Any]:
        """Results of the jobs in their order; None where one failed.

        A job fails when it times out, raises, or two workers die on it.

        Raises:
            ValueError: for a job of more than 32 KiB as JSON.
            RuntimeError: if no worker comes up, with the reason.
        """
        lines = [json.dumps(job).encode() + b"\n" for job in jobs]
        for line in lines:
            if len(line) > _MAX_JOB_BYTES:
                raise ValueError(f"job of {len(line)} bytes; pass at most {_MAX_JOB_BYTES}")
        return self._run(lines, want=min(self._size, len(lines)))

    def close(self) -> None:
        """Kill the workers. The next job starts new ones."""
        if self._pid == os.getpid():
            _kill_all(self._workers, self._pid)

    def _run(self, lines: list[bytes], want: int) -> list[Any]:
        self._forget_after_fork()
        try:
            return self._loop(lines, want)
        except BaseException:
            self.close()  # a half-read reply must not answer a later job
            raise

    def _forget_after_fork(self) -> None:
        if self._pid != os.getpid():
            self._finalizer.detach()
            for worker in self._workers:
                worker.disown()
            self._reset()

    def _loop(self, lines: list[bytes], want: int) -> list[Any]:
        results: list[Any] = [None] * len(lines)
        attempts = [0] * len(lines)
        queue = deque(range(len(lines)))
        failed_starts = 0
        while True:
            while len(self._workers) < want:
                self._workers.append(_Worker(self._spec))
            for worker in list(self._workers):
                if queue and worker.idle:
                    if worker.send(queue[0], lines[queue[0]], self._timeout):
                        queue.popleft()
                    else:
                        self._drop(worker)
            waiting = [w for w in self._workers if not w.idle]
            busy = any(w.job is not None for w in waiting)
            if not (queue or busy or (waiting and not lines)):
                return results
            for worker, reply in _wait(waiting):
                job = worker.job
                if worker.starting:
                    error = _start_error(worker, reply)
                    if error is None:
                        worker.starting = False
                        continue
                    failed_starts += 1
                    self._drop(worker)
                    if failed_starts >= _MAX_FAILED_STARTS:
                        raise RuntimeError(f"a worker process did not start: {error}")
                elif reply is _EXPIRED:
                    self.kills += 1
                    self._drop(worker)
                elif reply is None:
                    self._drop(worker)
                    if job is not None:
                        attempts[job] += 1
                        if attempts[job] < _MAX_ATTEMPTS:
                            queue.append(job)
                else:
                    if job is not None:
                        results[job] = json.loads(reply)
                    worker.job = None
                    worker.jobs_done += 1
                    if worker.jobs_done >= self._max_jobs:
                        self._drop(worker)

    def _drop(self, worker: "_Worker") -> None:
        worker.kill()
        self._workers.remove(worker)


_EXPIRED = object()


class _Worker:
    """One process: starting, then idle or busy with a job until its deadline."""

    def __init__(self, spec: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, _ROOT, spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # a Ctrl-C on the terminal goes to the trainer alone
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.starting = True
        self.job: int | None = None
        self.jobs_done = 0
        self.deadline = time.monotonic() + _START_SECONDS
        self._buffer = b""

    @property
    def idle(self) -> bool:
        return not self.starting and self.job is None

    def send(self, job: int, line: bytes, timeout: float) -> bool:
        """Hand over a job; False if the process is gone."""
        try:
            self.stdin.write(line)
        except OSError:
            return False
        self.job = job
        self.deadline = time.monotonic() + timeout
        return True

    def read(self) -> bytes | None:
        """The reply, b"" while it is incomplete, None if the process has ended."""
        chunk = os.read(self.stdout.fileno(), 1 << 16)
        if not chunk:
            return None
        self._buffer += chunk
        if not self._buffer.endswith(b"\n"):
            return b""
        reply, self._buffer = self._buffer, b""
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def disown(self) -> None:
        """Forget a process that belongs to the parent of this one."""
        self.process.returncode = 0  # Popen would look for its child here
        self._close()

    def _close(self) -> None:
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _wait(workers: list[_Worker]) -> list[tuple[_Worker, Any]]:
    """Replies of these workers; waits for one or for the next deadline."""
    if not workers:
        return []
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        next_deadline = min(worker.deadline for worker in workers)
        keys = [key for key, _ in selector.select(max(0.0, next_deadline - time.monotonic()))]
    events: list[tuple[_Worker, Any]] = []
    for key in keys:
        reply = key.data.read()
        if reply != b"":
            events.append((key.data, reply))
    answered = {id(worker) for worker, _ in events}
    now = time.monotonic()
    for worker in workers:
        if worker.deadline <= now and id(worker) not in answered:
            events.append((worker, _EXPIRED))
    return events


def _start_error(worker: _Worker, reply: Any) -> str | None:
    if reply is _EXPIRED:
        return f"no sign of life within {_START_SECONDS:.0f} s"
    if reply is None:
        return f"it ended with code {worker.process.wait()}"
    error = json.loads(reply)
    return None if error is None else str(error)


def _kill_all(workers: list[_Worker], pid: int) -> None:
    if os.getpid() == pid:
        while workers:
            workers.pop().kill()


def _serve(spec: str) -> None:
    """Loop of a worker: read a job, write its result, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = json.loads(spec)
    _end_with_parent(options["parent"])
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a print must not look like a reply
    _limit_memory(options["memory"])
    # The parent keeps the deadline. Should the parent be stopped or gone, the kernel ends a stuck
    # worker: SIGALRM kills a process that has no handler, whatever it is busy with.
    alarm = 2 * options["timeout"] + 1
    try:
        function = _load(options["function"])
        if options["warm_up"] is not None:
            function(*options["warm_up"])
    except BaseException as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        replies.write(json.dumps(message).encode() + b"\n")
        return
    replies.write(b"null\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, alarm)
        try:
            result = json.dumps(function(*json.loads(line)))
        except Exception:  # MemoryError and RecursionError included: the job fails
            result = "null"
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(result.encode() + b"\n")


def _load(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process with its parent; elsewhere, the end of the pipe ends it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


def _limit_memory(size: int) -> None:
    import resource  # not on Windows

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
