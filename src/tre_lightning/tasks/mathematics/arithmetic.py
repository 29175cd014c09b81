r"""Arithmetic problems in the format of MATH: ``7 * 8 + 5 =``, answered in worked steps.

A worked response is ``7 * 8 = 56 , 56 + 5 = 61 , \boxed{ 61 }``: a step for each operator, products
first, each kind from left to right. In every problem the order of the steps matters: some other
order, of steps just as sound, ends at another number.
"""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from tre_lightning.common.seeding import derived_seed
from tre_lightning.tasks.draws import MAX_DRAWS, between, pick, split_of_hash

BOX, END = "\\boxed{", "}"

_MAX_NUMBERS = 5
_LARGEST = 9999  # each number is a word
_RESULT = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class ArithmeticSpec:
    """Options of generated problems; every range is (min, max), both included.

    Attributes:
        count: how many numbers a problem has, within 3 to 5.
        number_range: range of each of them.
        operations: the operators, two or three of ``+-*``.
        max_value: largest result of a step; the smallest is 0.

    Raises:
        ValueError: if a field is out of bounds.
    """

    count: tuple[int, int] = (3, 3)
    number_range: tuple[int, int] = (1, 12)
    operations: str = "+-*"
    max_value: int = 100

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not 1 <= self.max_value <= _LARGEST:
            raise ValueError(
                f"data.arithmetic.max_value={self.max_value}; use an int from 1 to {_LARGEST}"
            )
        for name, (low, high), least, most in (
            ("count", self.count, 3, _MAX_NUMBERS),
            ("number_range", self.number_range, 0, self.max_value),
        ):
            if not least <= low <= high <= most:
                raise ValueError(
                    f"data.arithmetic.{name}={low, high}; use (min, max) with {least} <= min <= "
                    f"max <= {most}"
                )
        if not (set(self.operations) <= set("+-*") and 1 < len(set(self.operations)) < 4):
            raise ValueError(
                f"data.arithmetic.operations={self.operations!r}; use two or three of '+-*'"
            )

    def vocabulary(self) -> list[str]:
        """Every word of the problems and worked responses."""
        return [*dict.fromkeys(self.operations), "=", ",", BOX, END] + [
            str(number) for number in range(self.max_value + 1)
        ]


class Problem(NamedTuple):
    """``numbers[0] operators[0] numbers[1] ...``."""

    numbers: tuple[int, ...]
    operators: str

    @property
    def text(self) -> str:
        """The prompt, ``7 * 8 + 5 =``."""
        pairs = zip(self.operators, self.numbers[1:], strict=True)
        return " ".join([str(self.numbers[0]), *(f"{o} {n}" for o, n in pairs), "="])


class Work(NamedTuple):
    """Worked steps and their result."""

    steps: tuple[str, ...]
    value: int

    @property
    def text(self) -> str:
        r"""The response, ``7 * 8 = 56 , 56 + 5 = 61 , \boxed{ 61 }``."""
        return " , ".join([*self.steps, f"{BOX} {self.value} {END}"])


def generate(spec: ArithmeticSpec, split: str, index: int, seed: int) -> Problem:
    """Problem number ``index`` of a split; a pure function of its arguments.

    Problems may repeat within a split, never across splits.

    Raises:
        ValueError: for a spec that admits almost no problem of this split.
    """
    rng = random.Random(derived_seed("arithmetic", seed, split, index))
    for _ in range(MAX_DRAWS):
        size = between(rng, spec.count)
        numbers = tuple(between(rng, spec.number_range) for _ in range(size))
        operators = "".join(pick(rng, spec.operations) for _ in range(size - 1))
        problem = Problem(numbers, operators)
        if worked(problem, spec) and split_of(problem) == split and _mistakes(problem, spec):
            return problem
    raise ValueError(
        f"data.arithmetic={spec} gave no {split} problem in {MAX_DRAWS} draws; raise max_value or "
        "lower number_range"
    )


def split_of(problem: Problem) -> str:
    """The split of a problem (train 80 %, val 10 %, test 10 %), for any spec and seed.

    Decided by a hash of the sorted numbers and operators: ``8 * 7 + 5`` and ``5 + 7 * 8`` are in
    one split.
    """
    key = (str(sorted(problem.numbers)), "".join(sorted(problem.operators)))
    return split_of_hash(derived_seed("arithmetic_split", *key))


def worked(problem: Problem, spec: ArithmeticSpec) -> Work | None:
    """The correct steps; None if a result is below 0 or above ``max_value``."""
    places = range(len(problem.operators))
    products = [place for place in places if problem.operators[place] == "*"]
    return _work(problem, [*products, *(p for p in places if p not in products)], spec)


def mistaken(problem: Problem, spec: ArithmeticSpec, rng: random.Random) -> Work:
    """Steps in a wrong order, each correct, that end at a wrong number.

    Raises:
        ValueError: if the problem has no such steps; those of :func:`generate` have.
    """
    found = _mistakes(problem, spec)
    if not found:
        raise ValueError(f"no order of steps misses the value of {problem.text!r}")
    return pick(rng, found)


def _mistakes(problem: Problem, spec: ArithmeticSpec) -> list[Work]:
    right = worked(problem, spec)
    works = (_work(problem, order, spec) for order in permutations(range(len(problem.operators))))
    return [work for work in works if work is not None and right and work.value != right.value]


def _work(problem: Problem, order: Sequence[int], spec: ArithmeticSpec) -> Work | None:
    """The steps that apply the operators in this order."""
    parts = [[number] for number in problem.numbers]  # neighbours share a cell once they are joined
    steps = []
    for place in order:
        left, sign, right = parts[place][0], problem.operators[place], parts[place + 1][0]
        value = _RESULT[sign](left, right)
        if not 0 <= value <= spec.max_value:
            return None
        steps.append(f"{left} {sign} {right} = {value}")
        joined, gone = parts[place], parts[place + 1]
        joined[0] = value
        parts = [joined if part is gone else part for part in parts]
    return Work(tuple(steps), parts[0][0])
