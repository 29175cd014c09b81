"""What a response answers, as majority@k counts it: Countdown, MATH and tasks without answers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batches
from tre_lightning.tasks import CountdownDataModule, MathDataModule, PromptDataModule
from tre_lightning.tasks.countdown.scorer import Format
from tre_lightning.tasks.mathematics.prompts import normal_form

PROMPTS = batches.prompt_batch({"gold": "5", "numbers": (3, 4, 5), "target": 17}, split="val")


# ----- MATH


@pytest.fixture(scope="module")
def math() -> MathDataModule:
    pytest.importorskip("math_verify")
    return MathDataModule()


@pytest.mark.parametrize(
    ("response", "same"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}"),
        (r"\boxed{1,234}", r"\boxed{1234}"),
        (r"\boxed{ \dfrac12 }", r"\boxed{\frac{2}{4}}"),
        (r"\boxed{x = 5}", r"\boxed{5\text{ cm}}"),
        (r"\boxed{6} or rather \boxed{5}", r"\boxed{5}"),  # the last box
        (r"\boxed{(1,\ 2)}", r"\boxed{\left(1, 2\right)}"),
        (r"\boxed{2  x}", r"\boxed{2x}"),
        (r"\boxed{\oddity  {1}}", r"\boxed{\oddity {1}}"),  # not readable: its text
    ],
)
def test_answers_that_agree(math: MathDataModule, response: str, same: str) -> None:
    first, second = math.answers([response, same], PROMPTS)
    assert first is not None and first == second and hash(first) == hash(second)


@pytest.mark.parametrize(
    ("response", "other"),
    [
        (r"\boxed{0.33}", r"\boxed{\frac{1}{3}}"),
        (r"\boxed{(1,2)}", r"\boxed{\{1,2\}}"),
        (r"\boxed{12}", r"\boxed{1 + 2}"),
        (r"\boxed{\text{odd}}", r"\boxed{\text{even}}"),
        (r"\boxed{2x}", r"\boxed{x + x}"),  # nothing is evaluated
    ],
)
def test_answers_that_differ(math: MathDataModule, response: str, other: str) -> None:
    first, second = math.answers([response, other], PROMPTS)
    assert first is not None and second is not None and first != second


@pytest.mark.parametrize("response", ["", "5", r"\boxed{5", r"\boxed{}", r"\boxed{  }"])
def test_a_response_without_a_box_has_no_answer(math: MathDataModule, response: str) -> None:
    assert list(math.answers([response, r"\boxed{5}"], PROMPTS)) == [None, 5]


@settings(max_examples=200)
@given(
    st.text(st.sampled_from("\\{}()[]^_+-*/=<>,.;:$%&|! 0123456789xyisqrtfacbode\n"), min_size=1)
)
@example("\\frac" * 400)
@example("(" * 5000)
@example("9" * 5000)
@example("9^{9^{9^9}}")
@example("1" + "0" * 998)
@example("9^{9999}")
def test_any_text_has_a_normal_form(text: str) -> None:
    form = normal_form(text)
    assert form == normal_form(f" {text}\n") and hash(form) == hash(normal_form(f" {text}\n"))


def test_a_text_too_long_to_read_is_itself() -> None:
    assert normal_form("0" * 1000 + "  5") == "0" * 1000 + " 5"


# ----- Countdown


@pytest.mark.parametrize(
    ("layout", "response", "answer"),
    [
        ("steps", "3 * 4 = 12 ,12+5=17", "3 * 4 = 12 , 12 + 5 = 17"),
        ("steps", " \n", None),
        ("steps", "", None),
        ("answer", "I say <answer>(3*4)\n+ 5</answer>\n", "( 3 * 4 ) + 5"),
        ("answer", "<answer>34 * 5</answer>", "34 * 5"),
        ("answer", "<answer>3 4 * 5</answer>", "3 4 * 5"),  # not 34
        ("answer", "(3 * 4) + 5", None),
        ("answer", "<answer> </answer>", None),
        ("answer", "<answer>1</answer><answer>2</answer>", "2"),  # the last one
        ("answer", "<answer>1</answer> or so", "1"),
        ("think_answer", "3 * 4 </think><answer>3*4+5</answer>", "3 * 4 + 5"),
        ("think_answer", "<answer>3*4+5</answer>", None),
    ],
)
def test_countdown_answers(layout: Format, response: str, answer: str | None) -> None:
    data = CountdownDataModule(format=layout)
    assert data.answers([response, response], PROMPTS) == [answer, answer]


# ----- other tasks


def test_a_task_has_neither_answers_nor_timeouts_unless_it_says_so() -> None:
    plain = CountdownDataModule()
    assert PromptDataModule.answers(plain, ["5"], PROMPTS) is None
    assert plain.scorer_timeouts() is None
