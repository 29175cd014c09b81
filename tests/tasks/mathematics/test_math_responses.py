"""The MATH scorer on responses: the box that counts, and hostile texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
from math_answers import score
from tre_lightning.tasks.mathematics.scorer import MathScorer, last_boxed, score_math

# --- The box -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),  # cut off
        (r"\boxed{1} then \boxed 2", "1"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\fbox{1} then \boxed{2}", "2"),
        (r"\boxed {2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{1 \boxed{2}}", r"1 \boxed{2}"),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"\boxed{1}} }", "1"),
        (r"}} \boxed{1", None),
        (r"\\boxed{1}", None),  # an escaped backslash, then letters
        (r"\\\boxed{1}", "1"),
        (r"\boxedx{1}", None),
        (r"\boxed{}", ""),
        ("the final answer is $7$", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(response: str, content: str | None) -> None:
    assert last_boxed(response) == content


def closed_boxes(text: str) -> list[tuple[int, str]]:
    """End and content of each box, by counting braces from each opening; quadratic."""
    pieces, i = [], 0
    while i < len(text):
        step = 2 if text[i] == "\\" else 1
        for command in ("\\boxed{", "\\fbox{"):
            if text.startswith(command, i):
                step = len(command)
        pieces.append(text[i : i + step])
        i += step
    boxes = []
    for start, piece in enumerate(pieces):
        if len(piece) <= 2:
            continue
        depth = 0
        for end in range(start, len(pieces)):
            depth += pieces[end].endswith("{") and pieces[end] != "\\{"
            depth -= pieces[end] == "}"
            if depth == 0:
                boxes.append((end, "".join(pieces[start + 1 : end])))
                break
    return boxes


@settings(max_examples=500)
@given(
    st.lists(
        st.sampled_from(["\\boxed{", "\\fbox{", "{", "}", "}", "\\{", "\\}", "\\\\", "a", "\\b"]),
        max_size=25,
    )
)
def test_the_box_agrees_with_counting_braces(pieces: list[str]) -> None:
    text = "".join(pieces)
    boxes = closed_boxes(text)
    assert last_boxed(text) == (max(boxes)[1] if boxes else None)


def test_without_a_closed_box_or_a_gold_the_score_is_zero(scorer: MathScorer) -> None:
    responses = ["5", "The final answer is $5$. I hope", "\\boxed{5", "\\boxed 5", "", "\\boxed{5}"]
    assert scorer.score(responses, ["5"] * 6) == [0, 0, 0, 0, 0, 1]
    empty = ["", " ", "\n"]
    assert scorer.score(["\\boxed{}"] * 3 + ["\\boxed{ }"] * 3, empty * 2) == [0] * 6
    assert scorer.score(["\\boxed{}", "\\boxed{$$}", "\\boxed{\\text{}}"], ["5"] * 3) == [0, 0, 0]


# --- Hostile responses ---------------------------------------------------------------------------

HOSTILE_ANSWERS = {
    "tower": "9^{9^{9^9}}",
    "power": "2^{99999999999}",
    "exponential tower": "e^{e^{e^{e^{9}}}}",
    "factorial": "100000000!",
    "factorials": "3!!!!!",
    "binomial": "\\binom{1000000000}{500000000}",
    "expansion": "(x+y+z+1)^{400}",
    "brackets": "(" * 800 + "1" + ")" * 800,
    "brackets that pass": "(" * 11 + "x" + ")" * 11,
    "braces": "{" * 400 + "1" + "}" * 400,
    "fractions": "\\frac{1}{" * 300 + "2" + "}" * 300,
    "roots": "\\sqrt{" * 120 + "2" + "}" * 120,
    "bars": "|" * 900 + "x",
    "exponents": "x^" * 400 + "2",
    "indices": "x_" * 400 + "2",
    "signs": "-" * 900 + "1",
    "commas": "1," * 450 + "1",
    "thousands": "1,000" * 180,
    "plus-minus": "\\pm 1" * 150,
    "texts": "\\text{" * 120 + "}" * 120,
    "digits": "9" * 990,
    "sum": "\\sum_{k=1}^{10^{10}} k",
    "one megabyte": "\\frac{1}{2}+" * 90_000 + "1",
    "one megabyte of letters": "x" * 1_000_000,
    "NUL": "5\0",
    "surrogate": "5\ud800",
    "surrogates": "\udfff\ud800" * 400,
    "other digits": "\u0665",
}


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
@pytest.mark.parametrize("gold", ["5", "x^2+\\sqrt{2}", "(1,2)"])
def test_hostile_answers_score_zero_and_the_next_counts(
    scorer: MathScorer, name: str, gold: str
) -> None:
    scorer.start()
    assert score(scorer, gold, HOSTILE_ANSWERS[name]) == 0.0
    assert score(scorer, "2\\sqrt{3}", "\\sqrt{12}") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" * 150_000,
        "\\boxed{" + "{" * 1_000_000,
        "{" * 500_000 + "\\boxed{" + "}" * 500_000,
        "\\" * 1_000_000 + "boxed{5}",
        "\\boxed" + " " * 1_000_000,
        "\\boxed " * 150_000,
        "\\boxed{\\" * 120_000,
        "\0" * 1_000_000 + "\\boxed{6}",
        "\ud800" * 500_000 + "\\boxed{6}",
        "}" * 1_000_000 + "\\boxed{6}",
    ],
)
def test_hostile_responses_score_zero(response: str) -> None:
    def check() -> None:
        assert score_math(response, "5") == 0.0

    assert runs.exit_code(runs.forked(check), seconds=60) == 0  # not None: it hangs


def test_a_box_after_a_megabyte_is_found(scorer: MathScorer) -> None:
    for noise in ("{", "}", "\\{", "\\boxed{", "x", "\0", "\ud800"):
        assert scorer.score([noise * 200_000 + "\\boxed{5}"], ["5"]) == [1.0]


PIECES = [
    *"0123456789.,;:+-*/^_=<>|!()[]{}xyinde'\"&%$~ \n",
    *["\\frac ", "\\sqrt", "\\text{", "\\left", "\\right", "\\{", "\\}", "\\pm", "\\cup", "\\in "],
    *["\\le", "\\ne", "\\approx", "\\infty", "\\pi", "\\sin", "\\log", "\\binom", "\\lfloor"],
    *["\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\,", "\\!", "\\overline", "^\\circ", "\\%"],
    *[" or ", " and ", "cm", "million", "\\text{ cm}", "\0", "\ud800", "\u00b2", "\u0665"],
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=30), st.sampled_from(["5", "x+y"]))
def test_no_text_raises_or_hangs(scorer: MathScorer, pieces: list[str], gold: str) -> None:
    answer = "".join(pieces)
    assert score(scorer, gold, answer) in (0.0, 1.0)
    box = last_boxed(f"\\boxed{{{answer}}}")
    if box is not None and box.strip():
        assert score(scorer, box, answer) == 1.0  # as a gold it may be nonsense, too
    assert scorer.timeouts() == 0
