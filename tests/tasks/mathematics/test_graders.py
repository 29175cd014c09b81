r"""Other graders of MATH: the comparison of strings of Hendrycks et al., and math-verify's own."""

from typing import Any

import pytest

import batches
from tre_lightning.tasks import MathDataModule
from tre_lightning.tasks.mathematics.grading.hendrycks import hendrycks_box, hendrycks_equal
from tre_lightning.tasks.mathematics.scorer import MathScorer

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("42", "42", True),
        ("42", " 4 2\n", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\frac{1}{2}", r"\tfrac1{2}", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", ".5", True),
        (r"-\frac{3}{4}", "-3/4", False),  # becomes \frac{-3}{4}
        (r"\frac{-3}{4}", "-3/4", True),
        (r"\frac{1}{2}", r"\frac{2}{4}", False),  # nothing is computed
        ("0.25", r"\frac{1}{4}", False),
        ("03/4", "3/4", False),
        (r"\sqrt{3}", r"\sqrt3", True),
        (r"2\sqrt{3}", r"\sqrt{12}", False),
        ("5", "x=5", True),
        ("5", "k = 5", True),  # a name of two characters with its space
        ("5", "abc=5", False),
        ("5", "x=y=5", False),
        ("90", r"90^\circ", True),
        ("90", r"90^{\circ}", True),
        ("10", r"10\%", True),
        ("10", r"\$10", True),
        ("10", r"10\text{ cm}", True),
        ("10", r"10\text{cm}", False),
        ("10", r"10\text{ cm}\text{ or so}", False),  # two units: as it is written
        (r"(1,2)", r"\left( 1, 2 \right)", True),
        (r"a\text{ b}\text{ c}", r"a\text{ b}\text{ c}", True),
        (r"\sqrt", r"\sqrt", True),
        (r"\frac", r"\dfrac", False),
        ("", "", True),
        ("1000", "1,000", False),
    ],
)
def test_the_comparison_of_strings(gold: str, answer: str, equal: bool) -> None:
    assert hendrycks_equal(gold, answer) == equal


@pytest.mark.parametrize(
    ("response", "box"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", None),  # the last one does not close
        (r"$\boxed 7$ is it", "7"),
        (r"\boxed 7", "7"),
        (r"\fbox{7}", None),
        (r"\boxed{7} \fbox{8}", "7"),
        (r"\boxedtext{7}", None),
        ("42", None),
        (r"\boxed{" * 20_000, None),
        (r"\boxed{" + "{" * 20_000 + "}" * 20_001, "{" * 20_000 + "}" * 20_000),
    ],
)
def test_the_last_box(response: str, box: str | None) -> None:
    assert hendrycks_box(response) == box


# By exact, hendrycks and math_verify.
DIFFERENT = [
    ("42", "42", (1, 1, 1)),
    ("43", "42", (0, 0, 0)),
    (r"\frac{2}{4}", r"\frac{1}{2}", (1, 0, 1)),
    (r"\sqrt{12}", r"2\sqrt{3}", (1, 0, 1)),
    ("x=5", "5", (1, 1, 1)),
    ("3t", "3", (0, 0, 1)),  # a hole of math-verify
    ("abc=5", "5", (0, 0, 1)),
    ("", "42", (0, 0, 0)),
    ("4" * 5000, "42", (0, 0, 0)),
]


@pytest.mark.parametrize("place", range(3), ids=["exact", "hendrycks", "math_verify"])
def test_graders_differ_where_they_are_said_to(place: int) -> None:
    grader: Any = ("exact", "hendrycks", "math_verify")[place]
    answers, golds, scores = zip(*DIFFERENT, strict=True)
    with MathScorer(grader=grader, workers=1, timeout=30.0) as scorer:
        found = scorer.score_answers(answers, golds)
        assert [*zip(answers, found, strict=True)] == [
            (answer, float(score[place])) for answer, score in zip(answers, scores, strict=True)
        ]
        assert bool(scorer.pids) == (grader != "hendrycks")


@pytest.mark.parametrize(
    ("grader", "scores"),
    [("exact", [1.0, 1.0, 0.0, 1.0]), ("hendrycks", [1.0, 0.0, 1.0, 0.0])],
)
def test_the_grader_of_a_task(grader: Any, scores: list[float]) -> None:
    data = MathDataModule(grader=grader, workers=1)
    responses = [r"\boxed{1/2}", r"\boxed{2/4}", r"$\boxed 0.5$", r"\boxed{1/2} \boxed{3"]
    prompts = batches.prompt_batch(*[{"gold": r"\frac{1}{2}"}] * 4)
    try:
        assert data.score(responses, prompts).tolist() == scores
    finally:
        data.teardown()


def test_an_unknown_grader_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.grader=sympy must be one of the words exact"):
        MathDataModule(grader="sympy")  # type: ignore[arg-type]
