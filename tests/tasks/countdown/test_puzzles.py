"""Countdown puzzles: determinism, disjoint splits, the exhaustive search and the file reader."""

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tre_lightning.tasks.countdown.puzzles import (
    SPLITS,
    Puzzle,
    PuzzleSpec,
    as_answer,
    generate_puzzle,
    puzzle_split,
    random_derivation,
    read_puzzle,
    worked_solution,
)
from tre_lightning.tasks.countdown.scorer import score_countdown
from tre_lightning.tasks.sources import read_rows

SPECS = [
    PuzzleSpec(),
    PuzzleSpec(count=(2, 5), number_range=(1, 99), operations="+-"),
    PuzzleSpec(count=(2, 4), number_range=(5, 60), target_range=(70, 9999), operations="*/+"),
    PuzzleSpec(count=(6, 6), number_range=(3, 12), target_range=(10, 90), operations="+"),
    PuzzleSpec(count=(5, 5), target_range=(1, 40), operations="-*", max_intermediate=50),
]


def key(puzzle: Puzzle) -> tuple[tuple[int, ...], int]:
    """What makes two puzzles the same."""
    return tuple(sorted(puzzle.numbers)), puzzle.target


def operations_in(steps: str) -> set[str]:
    """The operations that steps use."""
    return set(steps.split()) & set("+-*/")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", Puzzle((6, 3, 6), 12)),
        ("val", Puzzle((2, 10, 8, 2), 5)),
        ("test", Puzzle((9, 7, 3, 2), 9)),
    ],
)
def test_puzzles_are_the_same_in_every_process(split: str, expected: Puzzle) -> None:
    """Pinned: catches salted hashes, global random state and silent changes of the data."""
    random.seed(0)
    assert generate_puzzle(PuzzleSpec(), split, 0, 0) == expected


def test_index_and_seed_change_the_puzzle() -> None:
    """An ignored argument would repeat one puzzle."""
    spec = PuzzleSpec(number_range=(1, 99))
    assert len({key(generate_puzzle(spec, "train", index, 0)) for index in range(50)}) > 40
    assert len({key(generate_puzzle(spec, "train", 0, seed)) for seed in range(50)}) > 40


def test_splits_are_disjoint_across_seeds() -> None:
    """No split may hold a puzzle of another, in whatever order its numbers stand."""
    spec = PuzzleSpec(count=(2, 3), number_range=(1, 6), target_range=(1, 20))  # many repeats
    found = {
        split: {key(generate_puzzle(spec, split, i, seed)) for i in range(200) for seed in (0, i)}
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]


def test_split_is_a_property_of_the_puzzle() -> None:
    """Order of numbers does not matter, the target does, and shares are near 80/10/10."""
    puzzles = [Puzzle((a, b, 7), t) for a in range(1, 21) for b in range(20) for t in range(10)]
    splits = [puzzle_split(p) for p in puzzles]
    assert splits == [puzzle_split(Puzzle(p.numbers[::-1], p.target)) for p in puzzles]
    # 4000 draws: the standard deviation of a share is at most 0.0063
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert len({puzzle_split(Puzzle((3, 4, 5), t)) for t in range(100)}) == 3


@given(st.sampled_from(SPECS), st.sampled_from(SPLITS), st.integers(0, 10**6), st.integers())
def test_generated_puzzles_obey_the_spec_and_are_solvable(
    spec: PuzzleSpec, split: str, index: int, seed: int
) -> None:
    """Ranges hold, the split is right, and the search finds a solution that scores."""
    puzzle = generate_puzzle(spec, split, index, seed)
    assert puzzle_split(puzzle) == split
    assert spec.count[0] <= len(puzzle.numbers) <= spec.count[1]
    assert all(spec.number_range[0] <= n <= spec.number_range[1] for n in puzzle.numbers)
    assert spec.target_range[0] <= puzzle.target <= spec.target_range[1]
    assert generate_puzzle(spec, split, index, seed) == puzzle
    steps = worked_solution(puzzle, spec, random.Random(seed))
    assert steps is not None
    assert operations_in(steps) <= set(spec.operations)
    assert score_countdown(steps, puzzle.numbers, puzzle.target, format="steps") == 1.0
    assert score_countdown(as_answer(steps), puzzle.numbers, puzzle.target) == 1.0


def test_every_count_and_extreme_number_occurs() -> None:
    """Ranges include both ends."""
    spec = PuzzleSpec(count=(2, 4), number_range=(1, 4), target_range=(1, 9))
    puzzles = [generate_puzzle(spec, "train", i, 0) for i in range(300)]
    assert {len(p.numbers) for p in puzzles} == {2, 3, 4}
    assert {n for p in puzzles for n in p.numbers} == {1, 2, 3, 4}
    assert {p.target for p in puzzles} >= {1, 9}


def test_spec_without_puzzles_is_refused() -> None:
    """2 + 2 never reaches 50: the redraws must end in an error, not a hang."""
    spec = PuzzleSpec(count=(2, 2), number_range=(2, 2), target_range=(50, 60))
    with pytest.raises(ValueError, match="no puzzle of split='val'") as error:
        generate_puzzle(spec, "val", 0, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 0, 0), "split='dev'"),
        (("train", -1, 0), "index=-1"),
        (("train", 0.0, 0), "index=0.0"),
        (("train", 0, None), "seed=None"),
    ],
)
def test_generate_refuses_bad_arguments(arguments: tuple[Any, Any, Any], message: str) -> None:
    """A mistyped split must not become a fourth one."""
    with pytest.raises(ValueError, match=f"^{message}"):
        generate_puzzle(PuzzleSpec(), *arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"count": (1, 3)},
        {"count": (4, 3)},
        {"count": (3, 7)},
        {"count": (3, 4, 5)},
        {"count": [3, 4]},
        {"count": 3},
        {"number_range": (0, 10)},
        {"number_range": (1.0, 10)},
        {"number_range": (True, 10)},
        {"number_range": (1, 10_001)},
        {"target_range": (0, 100)},
        {"target_range": (100, 1)},
        {"target_range": (1, 10_001)},
        {"operations": ""},
        {"operations": "+^"},
        {"operations": "++"},
        {"operations": ["+"]},
        {"max_intermediate": 0},
        {"max_intermediate": 10**9},
        {"max_intermediate": 1e4},
    ],
)
def test_spec_refuses_bad_fields(change: dict[str, Any]) -> None:
    """The message starts with the option, so that a config error is found at once."""
    with pytest.raises(ValueError, match=rf"^data\.puzzles\.{next(iter(change))}=") as error:
        PuzzleSpec(**change)
    assert "\n" not in str(error.value)


def reachable(numbers: tuple[int, ...], spec: PuzzleSpec) -> set[int]:
    """Values of all expressions over all the numbers, by splitting them in two in every way."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if mask >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not mask >> i & 1)
        for a in reachable(left, spec):
            for b in reachable(right, spec):
                results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else 0}
                found |= {results[operation] for operation in spec.operations}
    return {value for value in found if 1 <= value <= spec.max_intermediate}


@pytest.mark.parametrize("numbers", [(3, 5), (4, 4, 2), (1, 5, 5, 5), (6, 9, 2, 8), (7, 7, 3, 1)])
@pytest.mark.parametrize(
    "spec",
    [
        PuzzleSpec(),
        PuzzleSpec(operations="-/"),
        PuzzleSpec(number_range=(1, 9), max_intermediate=120),
    ],
    ids=["all", "minus-divide", "small"],
)
def test_search_is_exhaustive(numbers: tuple[int, ...], spec: PuzzleSpec) -> None:
    """Solves exactly the targets that an independent enumeration reaches, by right steps."""
    expected = reachable(numbers, spec)
    for target in range(1, 130):
        steps = worked_solution(Puzzle(numbers, target), spec, random.Random(target))
        assert (steps is not None) == (target in expected)
        if steps is not None:
            assert operations_in(steps) <= set(spec.operations)
            assert score_countdown(steps, numbers, target, format="steps") == 1.0


def test_solutions_vary_with_the_generator_only() -> None:
    """Randomised: several solutions of one puzzle, but one for one state of the generator."""
    puzzle = Puzzle((3, 4, 5), 12)
    solutions = [worked_solution(puzzle, PuzzleSpec(), random.Random(seed)) for seed in range(30)]
    assert solutions == [
        worked_solution(puzzle, PuzzleSpec(), random.Random(seed)) for seed in range(30)
    ]
    assert {"3 + 4 = 7 , 7 + 5 = 12", "4 + 5 = 9 , 3 + 9 = 12"} & set(solutions)
    assert len(set(solutions)) > 3


def test_solution_avoids_zero_on_the_way() -> None:
    """(15 - 15) * 35 + 53 is the only way and passes through 0, so there is no worked solution."""
    puzzle = Puzzle((15, 35, 15, 53), 53)
    assert worked_solution(puzzle, PuzzleSpec(), random.Random(0)) is None


@given(
    st.sampled_from(SPECS[:4]), st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers()
)
def test_random_derivation_is_right(spec: PuzzleSpec, numbers: list[int], seed: int) -> None:
    """The value is what the steps reach; a step or a number less breaks it."""
    value, steps = random_derivation(spec, numbers, random.Random(seed))
    assert 1 <= value <= spec.max_intermediate
    assert operations_in(steps) <= set(spec.operations)
    assert score_countdown(steps, numbers, value, format="steps") == 1.0
    assert score_countdown(as_answer(steps), numbers, value) == 1.0


def test_random_derivation_uses_every_operation() -> None:
    """Catches an operation that is never drawn."""
    rng = random.Random(0)
    texts = [random_derivation(PuzzleSpec(), [8, 4, 2], rng)[1] for _ in range(100)]
    assert operations_in(" ".join(texts)) == set("+-*/")


def test_random_derivation_backtracks() -> None:
    """By minus alone 7 - 3 and 7 - 4 lead to 0, a dead end; only 7 - (4 - 3) is left."""
    spec = PuzzleSpec(operations="-")
    for seed in range(20):
        value, steps = random_derivation(spec, [7, 3, 4], random.Random(seed))
        assert (value, steps) == (6, "4 - 3 = 1 , 7 - 1 = 6")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([3], "length 1"), ([1] * 7, "length 7"), ([3, -1], "ints"), ([4, 4], "do not combine")],
)
def test_random_derivation_refuses(numbers: list[int], message: str) -> None:
    """4 and 4 by minus alone give 0 only."""
    with pytest.raises(ValueError, match=f"^numbers=.*{message}"):
        random_derivation(PuzzleSpec(operations="-"), numbers, random.Random(0))


@pytest.mark.parametrize("numbers", [(3,), (1,) * 7])
def test_worked_solution_refuses_odd_counts(numbers: tuple[int, ...]) -> None:
    """Seven numbers would make the exhaustive search run away."""
    with pytest.raises(ValueError, match=r"^numbers="):
        worked_solution(Puzzle(numbers, 3), PuzzleSpec(), random.Random(0))


@pytest.mark.parametrize(
    ("steps", "expression"),
    [
        ("3 + 5 = 8", "3 + 5"),
        ("3 * 4 = 12 , 12 + 5 = 17", "( 3 * 4 ) + 5"),
        ("3 * 4 = 12 , 5 + 12 = 17", "5 + ( 3 * 4 )"),
        ("9 - 1 = 8 , 4 * 2 = 8 , 8 / 8 = 1", "( 4 * 2 ) / ( 9 - 1 )"),
        ("8 / 2 = 4 , 4 * 4 = 16", "( 8 / 2 ) * 4"),  # one 4 is a result, the other given
        ("1 + 2 = 3 , 3 + 4 = 7 , 7 - 3 = 4", "( ( 1 + 2 ) + 4 ) - 3"),
    ],
)
def test_as_answer_writes_one_expression(steps: str, expression: str) -> None:
    """Every earlier result stands where it is used, in brackets."""
    assert as_answer(steps) == f"<think> {steps} </think> <answer> {expression} </answer>"


@pytest.mark.parametrize(
    "steps",
    [
        "",
        "3 + 5",
        "3 + 5 = 8 ,",
        "3+5=8",
        "3 ^ 5 = 8",
        "3 +- 5 = 8",
        "3 - 5 = -2",
        "a + 5 = 8",
        "3 + 5 : 8",
        "3 + 5 = 8 , 1 + 2 = 3",  # the 8 is never used
        "3 + 5 = 8\n",
    ],
)
def test_as_answer_refuses_what_is_no_chain(steps: str) -> None:
    """A demonstration with a wrong expression must not be written."""
    with pytest.raises(ValueError, match=r"^steps_text=") as error:
        as_answer(steps)
    assert "\n" not in str(error.value)


def load_puzzles(path: Path) -> list[Puzzle]:
    return [read_puzzle(row, where) for where, row in read_rows("data.x", str(path))]


def test_load_puzzles_reads_every_line(tmp_path: Path) -> None:
    """Other keys and blank lines are ignored, CRLF is fine, order is kept."""
    path = tmp_path / "puzzles.jsonl"
    path.write_bytes(
        b'{"id": "a", "nums": [44, 19, 35], "target": 98, "solution": "44"}\r\n'
        b"\n  \n"
        b'{"target": 6, "nums": [1, 2, 3, 6]}'
    )
    expected = [Puzzle((44, 19, 35), 98), Puzzle((1, 2, 3, 6), 6)]
    assert load_puzzles(path) == expected


GOOD = '{"nums": [1, 2], "target": 3}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nums", "the line is not JSON"),
        ("[" * 100_000, "the line is not JSON"),
        ('{"nums": [1, 2], "target": ' + "9" * 5000 + "}", "the line is not JSON"),
        ("[1, 2]", "the line is no object"),
        ('{"target": 3}', "nums=None"),
        ('{"nums": "12", "target": 3}', "nums='12'"),
        ('{"nums": [1, "2"], "target": 3}', "nums="),
        ('{"nums": [1, 2.0], "target": 3}', "nums="),
        ('{"nums": [1, true], "target": 3}', "nums="),
        ('{"nums": [1, -2], "target": 3}', "nums="),
        ('{"nums": [1, 1000000000], "target": 3}', "nums="),
        ('{"nums": [1], "target": 1}', "nums=.*length 1"),
        ('{"nums": [], "target": 1}', "nums=.*length 0"),
        ('{"nums": [1, 1, 1, 1, 1, 1, 1], "target": 7}', "nums=.*length 7"),
        ('{"nums": [1, 2]}', "target=None"),
        ('{"nums": [1, 2], "target": "3"}', "target='3'"),
        ('{"nums": [1, 2], "target": 3.0}', "target=3.0"),
        ('{"nums": [1, 2], "target": NaN}', "target=nan"),
        ('{"nums": [1, 2], "target": false}', "target=False"),
    ],
    ids=lambda value: value[:30],
)
def test_load_puzzles_names_the_bad_line(tmp_path: Path, line: str, message: str) -> None:
    """File, line number (blank lines counted), field and value stand in one line."""
    path = tmp_path / "puzzles.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=rf"puzzles\.jsonl:3: {message}") as error:
        load_puzzles(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


def test_load_puzzles_refuses_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A decoding error is named like any other bad line."""
    path = tmp_path / "puzzles.jsonl"
    path.write_bytes(b'{"nums": [1, 2], "target": 3, "id": "\xff"}')
    with pytest.raises(ValueError, match=r"puzzles\.jsonl:1: the line is not JSON"):
        load_puzzles(path)


@given(
    st.lists(
        st.builds(
            Puzzle, st.lists(st.integers(0, 99), min_size=2, max_size=6).map(tuple), st.integers()
        ),
        min_size=1,
        max_size=5,
    )
)
def test_load_puzzles_round_trip(
    tmp_path_factory: pytest.TempPathFactory, puzzles: list[Puzzle]
) -> None:
    """What is written is read, whatever the values."""
    path = tmp_path_factory.mktemp("puzzles") / "puzzles.jsonl"
    path.write_text(
        "".join(json.dumps({"nums": p.numbers, "target": p.target}) + "\n" for p in puzzles)
    )
    assert load_puzzles(path) == puzzles
