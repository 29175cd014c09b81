r"""Scorer of MATH answers: 1 exactly when the last closed ``\boxed`` or ``\fbox`` equals the gold.

A trained policy finds every hole of a grader, so this one decides by itself what is compared, and
how; the parts are in `tre_lightning.tasks.mathematics.grading`. `last_boxed` finds the answer. A
reader turns answer and gold into forms (value, list, tuple or interval, union, matrix, equation,
base-n number, ...) or refuses them; forms are matched part by part, and plain numbers as fractions.
Only what is left, two expressions such as ``2\sqrt{3}`` and ``\sqrt{12}``, goes to math-verify's
LaTeX grammar (its package latex2sympy2_extended), in a worker process that can be killed, and only
as LaTeX that was written here, from an allow-list. Two expressions are equal if they have the same
value at several points, exactly for rational ones and to 120 digits for others. math-verify's
extraction, normalisation and comparison are not used: they take 1/2^98 for 1/2^99, ``3t`` for 3 and
``N`` for ``n``.

What counts as equal, where a teacher might say either:

* A unit, a currency sign, ``^\circ`` or ``\%`` may be left out or added, not replaced by another.
  ``50\%`` equals both 50 and 1/2.
* ``x=5`` equals 5; ``k=5`` does not equal ``x=5``. All parts of ``a=b=c`` must equal the gold.
* A decimal is exact: 0.5 equals 1/2, 0.333 does not equal 1/3. Fractions need not be reduced.
* ``3,5``, ``5,3``, ``\{3,5\}``, ``3 \text{ or } 5`` are one list without an order; ``(3,5)`` is a
  tuple or interval and equals none of them. ``1\pm\sqrt{2}`` is a list of two.
* ``x<5`` equals ``(-\infty,5)``; a factored polynomial equals the expanded one.
* ``43_5`` equals ``43_{5}`` alone: neither 43 nor 23.
* Where the gold is a plain number (integer, decimal, fraction, mixed number, power of integers),
  the answer must be one: ``48 \cdot 52`` and ``\sqrt{16}`` may be copied from the question. Nor may
  a function (sine, logarithm, factorial, ...) appear where the gold has none.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence

from tre_lightning.tasks.mathematics.grading.boxes import boxed_answers, last_boxed
from tre_lightning.tasks.mathematics.grading.limits import MAX_CHARS
from tre_lightning.tasks.mathematics.grading.matching import decide, equal_in_worker
from tre_lightning.tasks.mathematics.workers import WorkerPool

__all__ = ["MathScorer", "boxed_answers", "last_boxed", "score_math", "score_math_batch"]

_WARM_UP = (r"\frac{x^2-1}{2}+\sqrt{3}", r"\sqrt{3}+(x-1)\cdot\frac{x+1}{2}")


class MathScorer:
    r"""Scores MATH responses with worker processes of its own.

    Most answers need none: the same text, a plain number, a form that differs. A worker that takes
    longer than the time-out, crashes or outgrows its memory is killed and replaced; the answer
    scores 0 and is counted, and nothing is raised. Scores are remembered by answer and gold. Not
    for use by two threads at once; after a fork, and after unpickling, it starts anew.

    Args:
        workers: number of processes; started when first needed.
        timeout: seconds for one answer.
        memory_gib: address space of a worker, in GiB.
        max_jobs: answers after which a worker is replaced.
        cache_size: number of (answer, gold) pairs to remember.

    Raises:
        ValueError: for an option out of range.
        ImportError: if math-verify is not installed.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout: float = 3.0,
        memory_gib: float = 2.0,
        max_jobs: int = 2000,
        cache_size: int = 20_000,
    ) -> None:
        if not isinstance(cache_size, int) or cache_size < 0:
            raise ValueError(f"cache_size={cache_size!r}; pass an int of at least 0")
        if importlib.util.find_spec("latex2sympy2_extended") is None:
            raise ImportError("the MATH scorer needs math-verify; pip install 'math-verify>=0.9'")
        self._pool = WorkerPool(
            f"{equal_in_worker.__module__}:{equal_in_worker.__name__}",
            workers=workers,
            timeout=timeout,
            memory_gib=memory_gib,
            max_jobs=max_jobs,
            warm_up=_WARM_UP,
        )
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._timeouts = 0

    def __enter__(self) -> "MathScorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.pids

    def start(self) -> None:
        """Start the workers now instead of at the first answer that needs one.

        Raises:
            RuntimeError: if they do not come up, with the reason.
        """
        self._pool.start()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def timeouts(self) -> int:
        """Number of answers that timed out since the last call."""
        count, self._timeouts = self._timeouts, 0
        return count

    def score(self, responses: Sequence[str], golds: Sequence[str]) -> list[float]:
        r"""Score each response against its gold: 1.0 if equal, else 0.0.

        Args:
            responses: the generated texts; any string is safe.
            golds: the right answers, without ``\boxed``; an empty one scores 0.0.

        Raises:
            ValueError: for something other than as many strings each.
            RuntimeError: if no worker comes up, with the reason.
        """
        _check(responses, golds)
        return self.score_answers([last_boxed(response) for response in responses], golds)

    def score_answers(self, answers: Sequence[str | None], golds: Sequence[str]) -> list[float]:
        """Score answers that were taken out of their responses; None, no answer, scores 0.0.

        Raises:
            RuntimeError: if no worker comes up, with the reason.
        """
        scores = [0.0] * len(answers)
        undecided: dict[tuple[str, str], list[int]] = {}
        for i, (answer, gold) in enumerate(zip(answers, golds, strict=True)):
            if answer is None:
                continue
            pair = gold.strip(), answer.strip()
            score = self._cache.get(pair)
            if score is None:
                equal = decide(*pair)
                if equal is None:
                    undecided.setdefault(pair, []).append(i)
                    continue
                score = float(equal)
                self._remember(pair, score)
            else:
                self._cache.move_to_end(pair)
            scores[i] = score
        results = self._pool.map(list(undecided)) if undecided else []
        for (pair, places), result in zip(undecided.items(), results, strict=True):
            if result is None:
                self._timeouts += len(places)
                continue
            self._remember(pair, float(result))
            for i in places:
                scores[i] = float(result)
        return scores

    def _remember(self, pair: tuple[str, str], score: float) -> None:
        if len(pair[1]) <= MAX_CHARS:
            self._cache[pair] = score
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)


def _check(responses: object, golds: object) -> None:
    for name, texts in [("responses", responses), ("golds", golds)]:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"{name}={texts!r:.100} is no list of strings")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{name} holds {text!r:.100}, which is not a string")
    assert isinstance(responses, Sequence) and isinstance(golds, Sequence)
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} golds; pass one gold each")


_shared_scorer: MathScorer | None = None


def score_math_batch(responses: Sequence[str], golds: Sequence[str]) -> tuple[list[float], int]:
    r"""Score responses with the workers that this process shares.

    Args:
        responses: the generated texts; any string is safe, and none raises.
        golds: the right answers, without ``\boxed``; an empty one scores 0.0.

    Returns:
        The scores, each 0.0 or 1.0, and how many answers timed out.

    Raises:
        ValueError: for something other than as many strings each.
    """
    global _shared_scorer
    if _shared_scorer is None:
        _shared_scorer = MathScorer()
    scores = _shared_scorer.score(responses, golds)
    return scores, _shared_scorer.timeouts()


def score_math(response: str, gold: str) -> float:
    r"""Score one response: 1.0 if its last closed ``\boxed`` equals the gold, else 0.0.

    Raises:
        ValueError: if an argument is not a string.
    """
    scores, _ = score_math_batch([response], [gold])
    return scores[0]
