"""Word problems: the scorer, what is held out, and the data module."""

import random
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import batches
from tre_lightning.tasks import WordProblemsDataModule, WordProblemSpec
from tre_lightning.tasks.word_problems.problems import (
    Kind,
    Problem,
    Step,
    generate,
    mistaken,
    split_of,
)
from tre_lightning.tasks.word_problems.scorer import score_word_problem

SUM = Problem("What is 6 + 2?", (6, 2), "+")
STORY = Problem("Ann has 3 boxes with 4 ... loses 5 of them ...", (3, 4, 5), "*-")


def score(response: str, problem: Problem = SUM) -> float:
    return score_word_problem(response, problem.numbers, problem.answer, len(problem.signs))


# ----- the scorer


@pytest.mark.parametrize(
    "response",
    [
        "8",
        "The answer is 8.",
        "6 + 2 = 8",
        "6+2=8",
        "6 + 2 = 8. So the answer is 8.0 in all",
        "To find the sum of 6 and 2, we add 6 to 2, which gives \\boxed{8}.",
        "$8$",
        "8 8 8",
    ],
)
def test_an_honest_answer_is_right(response: str) -> None:
    assert score(response) == 1.0


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("", "empty"),
        ("eight", "no digits"),
        ("6 + 2 = 9", "wrong"),
        ("-8", "another sign"),
        ("8 or 9", "the last number is another"),
        ("9 or 8", "tries two"),
        ("1 2 3 4 5 6 7 8", "counts up to it"),
        (" ".join(map(str, range(100))), "every number"),
        ("9,8", "a list without spaces"),
        ("9.8", "glued by a point"),
        ("7/8", "glued by a slash"),
        ("0123456789", "glued"),
        ("\uff19 8", "tries another in digits of another script"),
        ("8 \uff19", "ends with another"),
        ("\uff18", "not of ASCII"),
        ("9½ 8", "a fraction of one character"),
        ("4 + 4 + 8", "a sum that is not done"),
        ("8e0", "an exponent"),
        ("6 + 2 = 8, 8 + 1 = 9", "goes on to another number"),
        ("6 + 2 = 8. 3 more are 8", "a number that the solution does not need"),
    ],
)
def test_tricks_do_not_score(response: str, why: str) -> None:
    assert score(response) == 0.0, why


def test_two_steps_leave_room_for_one_result_between() -> None:
    assert STORY.answer == 7
    assert score("3 * 4 = 12, 12 - 5 = 7", STORY) == 1.0
    assert score("7", STORY) == 1.0
    assert score("12 8 7", STORY) == 0.0
    assert score("12", STORY) == 0.0


@given(st.lists(st.integers(0, 12), max_size=8), st.sampled_from([" ", ", ", ",", "\n", " or "]))
def test_no_list_of_numbers_scores_but_for_what_a_solution_holds(
    numbers: list[int], between: str
) -> None:
    right = score(between.join(map(str, numbers))) == 1.0
    assert not right or (numbers[-1] == 8 and {*numbers} <= {6, 2, 8})


@given(st.text())
def test_any_text_has_a_score(text: str) -> None:
    assert score(text) in (0.0, 1.0)
    assert score(text + " 9") == 0.0


def test_scores_follow_the_prompt_of_each_response() -> None:
    batch = batches.prompt_batch({"problem": SUM}, {"problem": STORY}, texts=("a", "b"))
    data = WordProblemsDataModule()
    assert data.score(["8", "7", "8", "7"], batch).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert data.answers(["6 + 2 = 8", "8.0", "6 + 2", "none"], batch) == [8, 8, None, None]


# ----- the problems

specs = st.builds(
    WordProblemSpec,
    kinds=st.sampled_from([("sum",), ("product", "difference"), ("story",), ("two_step_story",)]),
    number_range=st.sampled_from([(2, 20), (2, 30), (10, 99)]),
    factor_range=st.sampled_from([(2, 12), (2, 20)]),
)


@given(specs, st.sampled_from(["train", "val", "test"]), st.integers(0, 10**6))
def test_a_worked_solution_is_right_and_copying_the_question_is_not(
    spec: WordProblemSpec, split: str, index: int
) -> None:
    problem = generate(spec, split, index, 1)
    assert min(step.value for step in problem.steps) >= 1
    assert score(", ".join(step.text for step in problem.steps), problem) == 1.0
    assert score(f"The answer is {problem.answer}.", problem) == 1.0
    assert score(problem.text, problem) == 0.0
    assert all(str(number) in problem.text for number in problem.numbers)
    steps = mistaken(problem, random.Random(index))
    assert steps != problem.steps and all(eval(step.text.replace("=", "==")) for step in steps)
    for number, bounds in zip(problem.numbers, ranges(problem, spec), strict=True):
        assert bounds[0] <= number <= bounds[1]


def ranges(problem: Problem, spec: WordProblemSpec) -> list[tuple[int, int]]:
    first = spec.factor_range if problem.signs[0] == "*" else spec.number_range
    return [first, first, *[spec.number_range] * (len(problem.signs) - 1)]


def test_no_fact_of_a_held_out_question_is_trained_on() -> None:
    spec, facts, texts = WordProblemSpec(), {}, {}
    for split, seed in product(("train", "val", "test"), (1, 2)):
        for index in range(300):
            problem = generate(spec, split, index, seed)
            texts.setdefault(split, set()).add(problem.text)
            for step in problem.steps:
                pair = (step.left, step.right)
                key = (step.sign, pair if step.sign == "-" else tuple(sorted(pair)))
                facts.setdefault(split, set()).add(key)
    for held_out, other in (("val", "train"), ("test", "train"), ("val", "test")):
        assert not facts[held_out] & facts[other] and not texts[held_out] & texts[other]
        assert {sign for sign, _ in facts[held_out]} == {*"+-*"}
    assert split_of(Step(3, "+", 9)) == split_of(Step(9, "+", 3))


def test_problems_are_a_function_of_seed_and_index() -> None:
    one, same, other = (WordProblemsDataModule(seed=seed) for seed in (1, 1, 2))
    texts = [[data.train_prompt(i).text for i in range(30)] for data in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len({*texts[0]}) > 25
    assert one.demonstration(3, True) == same.demonstration(3, True) != one.demonstration(4, True)


@pytest.mark.parametrize(
    ("kind", "signs", "sentences"),
    [
        ("sum", {"+"}, {1}),
        ("difference", {"-"}, {1}),
        ("product", {"*"}, {1}),
        ("story", {"+", "-", "*"}, {2, 3}),
        ("two_step_story", {"++", "+-", "-+", "--", "*+", "*-"}, {3, 4}),
    ],
)
def test_each_kind_asks_for_what_it_says(kind: Kind, signs: set[str], sentences: set[int]) -> None:
    spec = WordProblemSpec(kinds=(kind,))
    problems = [generate(spec, "train", index, 1) for index in range(150)]
    assert {problem.signs for problem in problems} == signs
    assert {len(p.text.rstrip("?.").replace("?", ".").split(". ")) for p in problems} == sentences
    for problem in problems:
        assert problem.text.endswith("?") and "{" not in problem.text and "None" not in problem.text


def test_held_out_problems_differ() -> None:
    data = WordProblemsDataModule(val_size=40, test_size=50)
    for stage, size in (("val", 40), ("test", 50)):
        texts = {prompt.text for prompt in data.heldout_prompts(stage)[stage]}
        assert len(texts) == size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ()}, r"data\.problems\.kinds=\[\]; use different ones of sum, "),
        ({"kinds": ("sum", "root")}, r"data\.problems\.kinds=\['sum', 'root'\]; use"),
        ({"kinds": ("sum", "sum")}, r"data\.problems\.kinds="),
        ({"number_range": (1, 9)}, r"data\.problems\.number_range=\(1, 9\); use \(min, max\)"),
        ({"factor_range": (9, 2)}, r"data\.problems\.factor_range=\(9, 2\); use"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WordProblemSpec(**options)


def test_ranges_that_are_too_narrow_are_refused() -> None:
    narrow = WordProblemSpec(kinds=("sum",), number_range=(2, 2))
    with pytest.raises(ValueError, match=r"data\.problems=.* of the kind sum in .*; widen"):
        WordProblemsDataModule(narrow).heldout_prompts(
            "val" if split_of(Step(2, "+", 2)) != "val" else "test"
        )
    with pytest.raises(ValueError, match=r"data\.val_size=999, but data\.problems gives only"):
        few = WordProblemSpec(kinds=("sum",))
        WordProblemsDataModule(few, val_size=999).heldout_prompts("val")
    with pytest.raises(ValueError, match=r"data\.test_size=0 must be at least 1"):
        WordProblemsDataModule(test_size=0)
