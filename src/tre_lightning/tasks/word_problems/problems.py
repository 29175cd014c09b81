"""Arithmetic in English, made by seed: bare sums, differences and products, and short stories.

A fact, such as ``6 + 2``, belongs to one split (train 80 %, val 10 %, test 10 %), whatever the
words around it and, in sums and products, whatever its order. Every step of a question is a fact of
the question's split: what is held out is in no training question, nor a step of one.
"""

import operator
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from tre_lightning.common.seeding import derived_seed
from tre_lightning.tasks.draws import MAX_DRAWS, below, between, pick, split_of_hash

Kind = Literal["sum", "difference", "product", "story", "two_step_story"]

_LARGEST = 9999
_RESULT = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SIGN = {"sum": "+", "difference": "-", "product": "*"}

_BARE = {
    "+": (
        "What is {0} + {1}?",
        "How much is {0} plus {1}?",
        "What is the sum of {0} and {1}?",
        "What do you get if you add {1} to {0}?",
    ),
    "-": (
        "What is {0} - {1}?",
        "How much is {0} minus {1}?",
        "What is the difference between {0} and {1}?",
        "What is left if you take {1} away from {0}?",
    ),
    "*": (
        "What is {0} * {1}?",
        "How much is {0} times {1}?",
        "What is the product of {0} and {1}?",
        "What do you get if you multiply {0} by {1}?",
    ),
}
_START = (
    "{name} has {0} {things}.",
    "{name} starts the day with {0} {things}.",
    "{name} collects {0} {things}.",
)
_PACKED = (
    "{name} has {0} boxes with {1} {things} in each.",
    "{name} buys {0} bags of {1} {things} each.",
    "{name} fills {0} shelves with {1} {things} each.",
)
_CHANGE = {
    "+": (
        "{friend} brings {name} {2} more.",
        "Then {name} finds {2} more.",
        "Later {name} buys {2} more.",
    ),
    "-": (
        "{name} gives {2} of them to {friend}.",
        "Then {name} loses {2} of them.",
        "Later {name} sells {2} of them.",
    ),
}
_ASKED = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
    "How many {things} does {name} have in the end?",
)
_COMPARED = {
    "+": "{name} has {0} {things} and {friend} has {1}. How many {things} do they have together?",
    "-": "{name} has {0} {things} and {friend} has {1}. How many more {things} does {name} have?",
}
_NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate"),
    *("Leo", "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf"),
)
_THINGS = (
    *("apples", "balls", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers"),
    *("marbles", "oranges", "pencils", "shells", "stamps", "stickers", "stones", "toys"),
)


@dataclass(frozen=True)
class WordProblemSpec:
    """Options of generated word problems; every range is (min, max), both included.

    Attributes:
        kinds: what is asked, each kind equally often: ``sum``, ``difference`` and ``product`` in
            one short question, ``story`` of one step and ``two_step_story``.
        number_range: range of the numbers that a question adds or takes away, from 2.
        factor_range: range of those that it multiplies, from 2.

    Raises:
        ValueError: if a field is out of bounds.
    """

    kinds: tuple[Kind, ...] = get_args(Kind)
    number_range: tuple[int, int] = (2, 20)
    factor_range: tuple[int, int] = (2, 9)

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not self.kinds or len({*self.kinds} & {*get_args(Kind)}) < len(self.kinds):
            raise ValueError(
                f"data.problems.kinds={[*self.kinds]}; use different ones of "
                f"{', '.join(get_args(Kind))}, at least one"
            )
        for name in ("number_range", "factor_range"):
            low, high = getattr(self, name)
            if not 2 <= low <= high <= _LARGEST:
                raise ValueError(
                    f"data.problems.{name}={low, high}; use (min, max) with 2 <= min <= max <= "
                    f"{_LARGEST}"
                )


class Step(NamedTuple):
    """A fact: ``left sign right = value``."""

    left: int
    sign: str
    right: int

    @property
    def value(self) -> int:
        """The result."""
        return int(_RESULT[self.sign](self.left, self.right))

    @property
    def text(self) -> str:
        """As it is written down, ``6 + 2 = 8``."""
        return f"{self.left} {self.sign} {self.right} = {self.value}"


class Problem(NamedTuple):
    """A question, and what leads from its numbers to the answer: ``numbers[0] signs[0] ...``."""

    text: str
    numbers: tuple[int, ...]
    signs: str

    @property
    def steps(self) -> list[Step]:
        """The solution."""
        return chain(self.numbers, self.signs)

    @property
    def answer(self) -> int:
        """The result of the last step."""
        return self.steps[-1].value


def chain(numbers: tuple[int, ...], signs: str) -> list[Step]:
    """The steps from left to right, each with the result of the one before."""
    steps: list[Step] = []
    for sign, right in zip(signs, numbers[1:], strict=True):
        steps.append(Step(steps[-1].value if steps else numbers[0], sign, right))
    return steps


def generate(spec: WordProblemSpec, split: str, index: int, seed: int) -> Problem:
    """Problem number ``index`` of a split; a pure function of its arguments.

    Every result is at least 1, and the answer is none of the question's numbers. Questions may
    repeat within a split, never across splits.

    Raises:
        ValueError: for a spec that admits almost no problem of this split.
    """
    rng = random.Random(derived_seed("word_problem", seed, split, index))
    kind = pick(rng, spec.kinds)
    for _ in range(MAX_DRAWS):
        signs = _signs(kind, rng)
        ranges = [spec.factor_range if "*" in signs[:1] else spec.number_range] * 2
        ranges += [spec.number_range] * (len(signs) - 1)
        numbers = tuple(between(rng, bounds) for bounds in ranges)
        steps = chain(numbers, signs)
        if min(step.value for step in steps) < 1 or steps[-1].value in numbers:
            continue
        if all(split_of(step) == split for step in steps):
            return Problem(_worded(kind, numbers, signs, rng), numbers, signs)
    raise ValueError(
        f"data.problems={spec} gave no {split} problem of the kind {kind} in {MAX_DRAWS} draws; "
        "widen its ranges"
    )


def split_of(step: Step) -> str:
    """The split of a fact, for any spec and seed."""
    pair = [step.left, step.right] if step.sign == "-" else sorted((step.left, step.right))
    return split_of_hash(derived_seed("word_problem_split", step.sign, *pair))


def mistaken(problem: Problem, rng: random.Random) -> list[Step]:
    """Steps, each correct, of which one is of another kind than the question asks for."""
    place = below(rng, len(problem.signs))
    others = [sign for sign in "+-*" if sign != problem.signs[place]]
    signs = problem.signs[:place] + pick(rng, others) + problem.signs[place + 1 :]
    return chain(problem.numbers, signs)


def _signs(kind: Kind, rng: random.Random) -> str:
    if kind in _SIGN:
        return _SIGN[kind]
    first = pick(rng, "+-*")
    return first if kind == "story" else first + pick(rng, "+-")


def _worded(kind: Kind, numbers: tuple[int, ...], signs: str, rng: random.Random) -> str:
    """The question in English."""
    if kind in _SIGN:
        return pick(rng, _BARE[signs]).format(*numbers)
    name = pick(rng, _NAMES)
    friend = pick(rng, [other for other in _NAMES if other != name])
    words = {"name": name, "friend": friend, "things": pick(rng, _THINGS)}
    if signs in _COMPARED and below(rng, 4) == 0:
        return _COMPARED[signs].format(*numbers, **words)
    packed = signs[0] == "*"
    sentences = [pick(rng, _PACKED if packed else _START).format(*numbers, **words)]
    for sign, number in zip(signs[packed:], numbers[1 + packed :], strict=True):
        sentences.append(pick(rng, _CHANGE[sign]).format(None, None, number, **words))
    sentences.append(pick(rng, _ASKED).format(**words))
    return " ".join(sentences)
