"""The worker pool: deadlines, deaths of workers and of the parent, forks, pickles."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tre_lightning
from runs import is_running, wait_until
from tre_lightning.tasks.mathematics.workers import WorkerPool

SOURCE = str(Path(tre_lightning.__file__).parents[1])
FOREVER = "7 ** 10 ** 9"  # one operation in C, which no signal handler of Python interrupts


@pytest.fixture
def make_pool() -> Iterator[Callable[..., WorkerPool]]:
    """Pools that evaluate Python, so that a job can do anything."""
    pools: list[WorkerPool] = []

    def make(function: str = "builtins:eval", **options: Any) -> WorkerPool:
        pools.append(WorkerPool(function, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def run_script(body: str, **options: Any) -> subprocess.Popen[str]:
    header = f"import os, sys; sys.path.insert(0, {SOURCE!r})\n"
    header += "from tre_lightning.tasks.mathematics.workers import WorkerPool\n"
    script = header + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **options
    )


def test_results_come_in_the_order_of_the_jobs(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool("operator:mul")
    assert pool.map([[k, 2] for k in range(50)]) == [2 * k for k in range(50)]
    assert pool.map([["a b\0\ud800\u20ac\n", 2]]) == ["a b\0\ud800\u20ac\n" * 2]
    assert pool.map([]) == []
    assert len(pool.pids) == 2


def test_nothing_starts_before_it_is_needed(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=2)
    assert pool.pids == []
    assert pool.map([["1 + 1"]]) == [2]
    assert len(pool.pids) == 1  # one job, one worker
    pool.start()
    assert len(pool.pids) == 2


def test_a_stuck_worker_is_killed_at_the_deadline(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=2, timeout=1.0)
    pool.start()
    before = pool.pids
    assert pool.map([["1"], [FOREVER], ["2"], ["3"]]) == [1, None, 2, 3]
    assert pool.kills == 1
    assert len([pid for pid in before if is_running(pid)]) == 1
    assert pool.map([[FOREVER], [FOREVER]]) == [None, None]  # no worker is left
    assert pool.map([["4"], ["5"]]) == [4, 5]
    assert pool.kills == 3


def test_the_deadline_does_not_run_while_a_job_waits(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1, timeout=2.0)
    nap = "__import__('time').sleep(0.25) or 1"
    assert pool.map([[nap]] * 9) == [1] * 9  # more than 2 s together
    assert pool.kills == 0


def test_an_error_gives_up_the_job_alone(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1)
    pool.start()
    before = pool.pids
    recursion = "(lambda f: f(f))(lambda f: f(f))"
    assert pool.map([["1 / 0"], [recursion], ["object()"], ["6"]]) == [None, None, None, 6]
    assert pool.pids == before


def test_memory_is_limited(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1, memory_gib=1.0)
    assert pool.map([["len(bytes(2**31))"], ["len(bytes(2**20))"]]) == [None, 2**20]


def test_what_a_job_prints_is_no_result(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1)
    assert pool.map([["print('1\\n2') or 3"], ["4"]]) == [3, 4]


def test_a_worker_killed_from_outside_loses_no_job(
    make_pool: Callable[..., WorkerPool], tmp_path: Path
) -> None:
    pool = make_pool(workers=2)
    pool.start()
    for pid in pool.pids:  # idle
        os.kill(pid, signal.SIGKILL)
    assert pool.map([["1"], ["2"], ["3"]]) == [1, 2, 3]
    mark = tmp_path / "seen"
    suicide = "__import__('os').kill(__import__('os').getpid(), 9)"
    once = f"7 if __import__('os').path.exists({str(mark)!r}) else "  # busy: the first try dies
    once += f"(open({str(mark)!r}, 'w').close(), {suicide})"
    assert pool.map([[once], ["8"]]) == [7, 8]
    assert pool.map([[suicide], ["9"]]) == [None, 9]  # a second death, and it is given up
    assert pool.kills == 0


def test_workers_are_replaced_after_so_many_jobs(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1, max_jobs=3)
    pids = pool.map([["__import__('os').getpid()"]] * 8)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 2]


def test_ctrl_c_does_not_reach_a_worker(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1)
    pool.start()
    (pid,) = pool.pids
    assert os.getsid(pid) != os.getsid(0)  # a terminal's Ctrl-C goes to one session
    os.kill(pid, signal.SIGINT)
    assert pool.map([["5"]]) == [5]
    assert pool.pids == [pid]


def test_an_interrupted_call_leaves_no_old_reply(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1)
    pool.start()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.map([["__import__('time').sleep(1) or 'old'"]])
    finally:
        signal.signal(signal.SIGALRM, old)
    time.sleep(1)
    assert pool.map([["'new'"]]) == ["new"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_killed_parent() -> None:
    body = f"""
        pool = WorkerPool("builtins:eval", workers=2, timeout=600)
        pool.start()
        print(*pool.pids, flush=True)
        pool.map([[{FOREVER!r}]])
    """
    parent = run_script(body)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    time.sleep(0.3)  # one is busy now, one idle
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_parent_that_forgot_to_close() -> None:
    body = """
        pool = WorkerPool("builtins:eval", workers=2)
        pool.start()
        print(*pool.pids, flush=True)
    """
    parent = run_script(body)
    out, _ = parent.communicate(timeout=60)
    assert parent.returncode == 0
    wait_until(lambda: not any(is_running(int(pid)) for pid in out.split()))


def test_a_forked_child_starts_its_own_workers() -> None:
    body = """
        pool = WorkerPool("builtins:eval", workers=1)
        pool.start()
        mine = pool.pids
        child = os.fork()
        if child == 0:
            ok = pool.pids == [] and pool.map([["3"]]) == [3] and pool.pids != mine
            pool.close()
            os._exit(0 if ok else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(pool.map([["4"]]), pool.pids == mine)
    """
    process = run_script(body)
    out, _ = process.communicate(timeout=60)
    assert out.split("\n")[:2] == ["0", "[4] True"]


def test_a_pickled_pool_works_and_has_no_workers(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(workers=1, timeout=2.0)
    pool.start()
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.pids == []
    assert copy.map([["2"]]) == [2]
    copy.close()
    assert pool.map([["3"]]) == [3]


def test_close_ends_the_workers_and_a_job_starts_new_ones(
    make_pool: Callable[..., WorkerPool],
) -> None:
    with make_pool(workers=2) as pool:
        pool.start()
        pids = pool.pids
    assert not any(map(is_running, pids))
    assert pool.pids == []
    assert pool.map([["1"]]) == [1]


def test_a_worker_that_cannot_start_says_why(make_pool: Callable[..., WorkerPool]) -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        make_pool("no_such_module:f").map([["1"]])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        make_pool(warm_up=["1 / 0"]).start()


def test_workers_import_neither_torch_nor_the_main_module() -> None:
    body = """
        import types
        sys.modules["torch"] = types.ModuleType("torch")  # as in a trainer
        pool = WorkerPool("builtins:eval", workers=1)
        print(pool.map([["[n for n in ('torch', 'numpy') if n in __import__('sys').modules]"]]))
        print(pool.map([["hasattr(__import__('__main__'), 'pool')"]]))
    """
    out, _ = run_script(body).communicate(timeout=60)
    assert out.split() == ["[[]]", "[False]"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "builtins"}, "function='builtins'"),
        ({"workers": 0}, "workers=0"),
        ({"max_jobs": 0}, "max_jobs=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"memory_gib": -1}, "memory_gib=-1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerPool(**{"function": "builtins:eval", **options})


def test_a_job_that_a_pipe_may_not_hold_is_refused(make_pool: Callable[..., WorkerPool]) -> None:
    with pytest.raises(ValueError, match="bytes; pass at most 32768"):
        make_pool().map([["1" * 40_000]])
