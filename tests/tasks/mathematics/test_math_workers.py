"""The MATH scorer and its workers: deaths, time-outs, what is remembered, what is imported."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

from tre_lightning.tasks.mathematics.scorer import MathScorer, score_math, score_math_batch

ROOTS = [(f"{k}\\sqrt{{3}}", f"\\boxed{{\\sqrt{{{3 * k * k}}}}}") for k in range(2, 40)]


def test_a_stuck_worker_costs_its_answer_alone() -> None:
    with MathScorer(workers=1, timeout=3.0) as scorer:
        golds, responses = [list(column) for column in zip(*ROOTS, strict=True)]
        for _ in range(2):
            scorer.start()
            (pid,) = scorer.pids
            os.kill(pid, signal.SIGSTOP)  # stands still, as in one endless operation
            assert scorer.score(responses[:1], golds[:1]) == [0.0]
            assert scorer.timeouts() == 1
            assert scorer.timeouts() == 0
        assert scorer.score(responses, golds) == [1.0] * len(golds)  # the first one, too
        assert scorer.timeouts() == 0


def test_a_killed_worker_costs_nothing() -> None:
    with MathScorer(workers=2, timeout=30.0) as scorer:
        scorer.start()
        for pid in scorer.pids:
            os.kill(pid, signal.SIGKILL)
        golds, responses = zip(*ROOTS, strict=True)
        assert scorer.score(responses, golds) == [1.0] * len(golds)
        assert scorer.timeouts() == 0


def test_only_expressions_need_a_worker() -> None:
    with MathScorer() as scorer:
        golds = ["5", "\\frac{1}{2}", "x^2", "(1,2)", "3", "\\text{even}", "1,2", "x^2+1"]
        answers = ["5", "0.5", "x^{2}", "(1, 2)", "4", "odd", "2,1", "7"]
        responses = [f"\\boxed{{{answer}}}" for answer in answers]
        assert scorer.score(responses, golds) == [1, 1, 1, 1, 0, 0, 1, 0]
        assert scorer.pids == []
        assert scorer.score(["\\boxed{\\sqrt{12}}"], ["2\\sqrt{3}"]) == [1.0]
        assert len(scorer.pids) == 1


def test_scores_are_remembered_up_to_a_bound() -> None:
    with MathScorer(workers=1, cache_size=2) as scorer:
        golds, responses = zip(*ROOTS[:3], strict=True)
        assert scorer.score(responses, golds) == [1.0] * 3
        scorer.close()
        assert scorer.score(responses[1:], golds[1:]) == [1.0] * 2  # the last two
        assert scorer.pids == []
        assert scorer.score(responses[:1], golds[:1]) == [1.0]  # the first was forgotten
        assert len(scorer.pids) == 1


def test_a_group_of_equal_answers_is_one_job_but_many_timeouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[object] = []

    def give_up(pool: object, batch: list[object]) -> list[None]:
        jobs.extend(batch)
        return [None] * len(batch)

    monkeypatch.setattr("tre_lightning.tasks.mathematics.workers.WorkerPool.map", give_up)
    scorer = MathScorer()
    for _ in range(2):  # a time-out is not remembered: the machine may have been busy
        assert scorer.score(["\\boxed{\\sqrt{12}}"] * 4, ["2\\sqrt{3}"] * 4) == [0.0] * 4
    assert jobs == [("2\\sqrt{3}", "\\sqrt{12}")] * 2
    assert scorer.timeouts() == 8


def test_a_pickled_scorer_scores() -> None:
    with MathScorer(workers=1, timeout=30.0) as scorer:
        scorer.start()
        copy = pickle.loads(pickle.dumps(scorer))
        assert copy.pids == []
        assert copy.score(["\\boxed{\\sqrt{12}}"], ["2\\sqrt{3}"]) == [1.0]
        copy.close()


def test_the_functions_share_a_scorer() -> None:
    assert score_math("\\boxed{\\sqrt{12}}", "2\\sqrt{3}") == 1.0
    assert score_math("\\boxed{\\sqrt{13}}", "2\\sqrt{3}") == 0.0
    assert score_math_batch(["\\boxed{1}", "1"], ["1", "1"]) == ([1.0, 0.0], 0)
    assert score_math_batch([], []) == ([], 0)


@pytest.mark.parametrize(
    ("responses", "golds", "message"),
    [
        (["\\boxed{5}"], [], "1 responses but 0 golds"),
        ("\\boxed{5}", "5", "responses='.*' is no list"),
        (["\\boxed{5}"], [5], "golds holds 5"),
        ([None], ["5"], "responses holds None"),
    ],
)
def test_wrong_arguments_are_refused(responses: list[str], golds: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MathScorer().score(responses, golds)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_size=-1"):
        MathScorer(cache_size=-1)
    with pytest.raises(ValueError, match="workers=0"):
        MathScorer(workers=0)


def test_neither_the_trainer_nor_a_worker_imports_what_it_does_not_need() -> None:
    script = r"""
import sys
import tre_lightning.tasks.mathematics.scorer
from tre_lightning.tasks.mathematics.grading.matching import equal_in_worker

never = ["torch", "numpy", "transformers", "lightning", "math_verify"]
late = ["latex2sympy2_extended", "sympy", "mpmath"]
print([name for name in never + late if name in sys.modules])
assert equal_in_worker(r"2\sqrt{3}", r"\sqrt{12}")
print([name for name in never if name in sys.modules])
"""
    out = subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60)
    assert out.split() == ["[]", "[]"]
