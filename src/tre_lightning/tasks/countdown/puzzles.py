"""Countdown puzzles: generate them, read them from files, and solve them step by step.

A puzzle asks to combine all the given numbers, each once, into the target. A worked solution is a
chain of steps ``3 * 4 = 12 , 12 + 5 = 17`` in which every result is a positive integer; both it
and the text of :func:`as_answer` score 1.0 under
``tre_lightning.tasks.countdown.scorer.score_countdown``.
"""

import hashlib
import random
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

from tre_lightning.tasks.draws import MAX_DRAWS, SPLITS, below, between, split_of_hash

MAX_NUMBERS = 6  # numbers of the television game; bounds the exhaustive search

_LARGEST = 999_999_999  # the scorer reads at most 9 digits


@dataclass(frozen=True)
class Puzzle:
    """The given numbers, in the order shown, and the target."""

    numbers: tuple[int, ...]
    target: int
    where: str = field(default="", compare=False)  # the file and row


@dataclass(frozen=True)
class PuzzleSpec:
    """Options of generated puzzles; every range is (min, max), both included.

    Attributes:
        count: how many numbers a puzzle has, within 2 to 6.
        number_range: range of each given number.
        target_range: range of the target.
        operations: the allowed operations, some of ``+-*/``.
        max_intermediate: largest result of a step, at most 999999999.

    Raises:
        ValueError: if a field is of the wrong type or out of bounds.
    """

    count: tuple[int, int] = (3, 4)
    number_range: tuple[int, int] = (1, 10)
    target_range: tuple[int, int] = (1, 100)
    operations: str = "+-*/"
    max_intermediate: int = 10_000

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not (_is_int(self.max_intermediate) and 1 <= self.max_intermediate <= _LARGEST):
            raise ValueError(
                f"data.puzzles.max_intermediate={_show(self.max_intermediate)}; use an int from 1 "
                f"to {_LARGEST}"
            )
        _check_range("data.puzzles.count", self.count, 2, MAX_NUMBERS)
        _check_range("data.puzzles.number_range", self.number_range, 1, self.max_intermediate)
        _check_range("data.puzzles.target_range", self.target_range, 1, self.max_intermediate)
        operations: object = self.operations
        if not (
            isinstance(operations, str)
            and operations
            and set(operations) <= set("+-*/")
            and len(set(operations)) == len(operations)
        ):
            raise ValueError(
                f"data.puzzles.operations={_show(operations)}; use some of '+-*/', each once"
            )


class _Step(NamedTuple):
    left: int
    operator: str
    right: int
    result: int


def generate_puzzle(spec: PuzzleSpec, split: str, index: int, seed: int) -> Puzzle:
    """The puzzle number ``index`` of a split: a pure function of its arguments, always solvable.

    Numbers are drawn uniformly and combined by a random derivation until its value falls in
    ``target_range`` and the puzzle in the split (:func:`puzzle_split`). Puzzles may repeat within
    a split, never across splits.

    Raises:
        ValueError: for an unknown split, a bad index or seed, or a spec that admits almost no
            puzzle of this split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={_show(split)} is unknown; use one of {SPLITS}")
    if not (_is_int(index) and index >= 0):
        raise ValueError(f"index={_show(index)}; use an int of at least 0")
    if not _is_int(seed):
        raise ValueError(f"seed={_show(seed)}; use an int")
    rng = random.Random(_stable_hash(f"{split} {index} {seed}"))
    low, high = spec.target_range
    for _ in range(MAX_DRAWS):
        numbers = tuple(between(rng, spec.number_range) for _ in range(between(rng, spec.count)))
        steps = _derive(numbers, None, spec, rng, set())
        if steps is not None and low <= steps[-1].result <= high:
            puzzle = Puzzle(numbers, steps[-1].result)
            if puzzle_split(puzzle) == split:
                return puzzle
    raise ValueError(
        f"spec={spec} gave no puzzle of split={split!r} in {MAX_DRAWS} draws; "
        "widen number_range, target_range, count or operations"
    )


def canonical(puzzle: Puzzle) -> tuple[tuple[int, ...], int]:
    """Sorted numbers and target, equal for equal puzzles."""
    return tuple(sorted(puzzle.numbers)), puzzle.target


def puzzle_split(puzzle: Puzzle) -> str:
    """The split a puzzle belongs to (train 80 %, val 10 %, test 10 %), for any spec and seed.

    Decided by a hash of the sorted numbers and the target, so the order of numbers is irrelevant.
    """
    numbers, target = canonical(puzzle)
    return split_of_hash(_stable_hash(f"{list(numbers)} {target}"))


def random_derivation(
    spec: PuzzleSpec, numbers: Sequence[int], rng: random.Random
) -> tuple[int, str]:
    """Combine the numbers at random by the spec's operations into a positive integer.

    Returns:
        The value and the steps that lead to it, ``3 * 4 = 12 , 12 + 5 = 17``.

    Raises:
        ValueError: unless there are 2 to 6 non-negative ints, and if none of their
            combinations stays within 1 to ``max_intermediate``.
    """
    _check_numbers("numbers", numbers)
    steps = _derive(tuple(numbers), None, spec, rng, set())
    if steps is None:
        raise ValueError(
            f"numbers={_show(numbers)} do not combine into a positive integer by operations="
            f"{spec.operations!r} up to max_intermediate={spec.max_intermediate}; allow more"
        )
    return steps[-1].result, _write(steps)


def worked_solution(puzzle: Puzzle, spec: PuzzleSpec, rng: random.Random) -> str | None:
    """A random worked solution ``3 * 4 = 12 , 12 + 5 = 17``, or None if there is none.

    The search is exhaustive over the steps with the spec's operations whose results are positive
    integers up to ``max_intermediate``; a puzzle that needs a fraction, a zero or a negative
    number on the way has none.

    Raises:
        ValueError: unless the puzzle has 2 to 6 numbers, non-negative ints.
    """
    _check_numbers("numbers", puzzle.numbers)
    steps = _derive(puzzle.numbers, puzzle.target, spec, rng, set())
    return None if steps is None else _write(steps)


def as_answer(steps_text: str) -> str:
    """Turn worked steps, space-separated, into a response with think and answer tags.

    ``3 * 4 = 12 , 12 + 5 = 17`` becomes ``<think> 3 * 4 = 12 , 12 + 5 = 17 </think> <answer>
    ( 3 * 4 ) + 5 </answer>``: every step but the last is bracketed. The arithmetic is not checked.

    Raises:
        ValueError: if the text is no chain of steps, or a result other than the last is unused.
    """
    bad = f"steps_text={_show(steps_text)}; write '3 * 4 = 12 , 12 + 5 = 17', space-separated"
    unused: dict[str, list[str]] = {}  # result -> expressions worth it; equal ones interchange
    expression = result = ""
    for step in steps_text.split(" , "):
        if expression:
            unused.setdefault(result, []).append(f"( {expression} )")
        tokens = step.split(" ")
        if len(tokens) != 5 or tokens[1] not in {*"+-*/"} or tokens[3] != "=":
            raise ValueError(bad)
        left, operator, right, _, result = tokens
        if not all(n.isascii() and n.isdigit() for n in (left, right, result)):
            raise ValueError(bad)
        operands = [unused[n].pop() if unused.get(n) else n for n in (left, right)]
        expression = f"{operands[0]} {operator} {operands[1]}"
    if any(unused.values()):
        raise ValueError(bad)
    return f"<think> {steps_text} </think> <answer> {expression} </answer>"


def read_puzzle(row: Mapping[str, object], where: str) -> Puzzle:
    """The puzzle in a row ``{"nums": [3, 4, 5], "target": 17}``; other keys are ignored.

    ``nums`` holds 2 to 6 ints from 0 to 999999999.

    Raises:
        ValueError: if the row is none such; the message starts with ``where``.
    """
    numbers, target = row.get("nums"), row.get("target")
    if not isinstance(numbers, list):
        raise ValueError(f"{where}: nums={_show(numbers)} is not a list; write a list of ints")
    _check_numbers(f"{where}: nums", numbers)
    if not _is_int(target):
        raise ValueError(f"{where}: target={_show(target)} is not an int; write an int")
    return Puzzle(tuple(numbers), target, where)


def _derive(
    pool: tuple[int, ...],
    target: int | None,
    spec: PuzzleSpec,
    rng: random.Random,
    dead: set[tuple[int, ...]],
) -> list[_Step] | None:
    """Random steps from the pool to the target (None: to any value); None if there are none.

    ``dead`` collects the sorted pools that lead nowhere.
    """
    if len(pool) == 1:
        return [] if target is None or pool[0] == target else None
    key = tuple(sorted(pool))
    if key in dead:
        return None
    moves = _moves(pool, spec)
    while moves:
        pick = below(rng, len(moves))
        moves[pick], moves[-1] = moves[-1], moves[pick]
        i, j, step = moves.pop()
        rest = (*pool[:i], *pool[i + 1 : j], *pool[j + 1 :], step.result)
        tail = _derive(rest, target, spec, rng, dead)
        if tail is not None:
            if step.operator in "+*" and rng.random() < 0.5:
                step = step._replace(left=step.right, right=step.left)
            return [step, *tail]
    dead.add(key)
    return None


def _moves(pool: tuple[int, ...], spec: PuzzleSpec) -> list[tuple[int, int, _Step]]:
    """Every step over two positions i < j whose result is in 1..max_intermediate."""
    moves = []
    for j in range(1, len(pool)):
        for i in range(j):
            large, small = max(pool[i], pool[j]), min(pool[i], pool[j])
            for operator in spec.operations:
                if operator == "+":
                    result = large + small
                elif operator == "-":
                    result = large - small
                elif operator == "*":
                    result = large * small
                else:
                    result = large // small if small and large % small == 0 else 0
                if 1 <= result <= spec.max_intermediate:
                    moves.append((i, j, _Step(large, operator, small, result)))
    return moves


def _write(steps: list[_Step]) -> str:
    return " , ".join(f"{s.left} {s.operator} {s.right} = {s.result}" for s in steps)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if not (
        isinstance(value, tuple)
        and len(value) == 2
        and all(map(_is_int, value))
        and low <= value[0] <= value[1] <= high
    ):
        raise ValueError(
            f"{name}={_show(value)}; use a tuple (min, max) with {low} <= min <= max <= {high}"
        )


def _check_numbers(name: str, numbers: Sequence[object]) -> None:
    if not 2 <= len(numbers) <= MAX_NUMBERS:
        raise ValueError(
            f"{name}={_show(numbers)} has length {len(numbers)}; use 2 to {MAX_NUMBERS} numbers"
        )
    if not all(_is_int(n) and 0 <= n <= _LARGEST for n in numbers):
        raise ValueError(f"{name}={_show(numbers)}; use ints from 0 to {_LARGEST} only")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: object) -> str:
    return " ".join(reprlib.repr(value).split())
