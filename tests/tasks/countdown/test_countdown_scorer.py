"""The Countdown scorer: hand-computed cases, hostile texts and an independent oracle."""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs
from tre_lightning.tasks.countdown.scorer import Format, score_countdown


def answer(expression: str, numbers: Sequence[int], target: int) -> float:
    """Score an expression alone."""
    return score_countdown(f"<answer>{expression}</answer>", numbers, target, format="answer")


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("3*4+5", [3, 4, 5], 17),
        ("5+3*4", [5, 3, 4], 17),  # precedence, numbers in another order than given
        (" ( 5 + 3 )\n*\t4 ", [3, 4, 5], 32),
        ("10-4-3", [3, 4, 10], 3),  # left-associative: 10-(4-3) is 9
        ("10-(4-3)", [3, 4, 10], 9),
        ("16/4/2", [2, 4, 16], 2),  # 16/(4/2) is 8
        ("8/(3-8/3)", [3, 3, 8, 8], 24),  # needs the exact third
        ("1/49*49", [1, 49, 49], 1),  # 0.9999999999999999 in floats
        ("3-5", [3, 5], -2),  # the target, unlike a token, may be negative
        ("((((7))))", [7], 7),
        ("0*123456789", [0, 123456789], 0),
        ("6\u00d74\u00f73", [3, 4, 6], 8),
        ("(" * 64 + "7" + ")" * 64, [7], 7),
    ],
)
def test_right_expressions_score_one(expression: str, numbers: list[int], target: int) -> None:
    """Each of these is worth its target by hand; another target must score 0."""
    assert answer(expression, numbers, target) == 1.0
    assert answer(expression, numbers, target + 1) == 0.0


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("3*4", [3, 4, 5], 12),  # one number unused
        ("3*4+5*1", [3, 4, 5], 17),  # one number too many
        ("3+3", [3, 4], 6),  # one used twice
        ("3+3+4", [3, 4, 4], 10),  # right set and count, wrong multiset
        ("34", [3, 4], 34),  # digits glued
        ("3 4", [3, 4], 34),
        ("7//2*3", [2, 3, 7], 9),
        ("2**5", [2, 5], 32),
        ("1.5+3.5", [1, 5, 3, 5], 5),
        ("-3+5", [3, 5], 2),  # signs
        ("5+-3", [3, 5], 2),
        ("5-(-3)", [3, 5], 8),
        ("+3+5", [3, 5], 8),
        ("3+5=8", [3, 5], 8),
        ("= 3+5", [3, 5], 8),
        ("x 3+5", [3, 5], 8),
        ("3+5;", [3, 5], 8),
        ("3+5,", [3, 5], 8),
        ("3_0", [30], 30),
        ("1e1", [1, 1], 10),
        ("07", [7], 7),
        ("00", [0], 0),
        ("\u0663+5", [3, 5], 8),  # ARABIC-INDIC DIGIT THREE, an int() to Python
        ("\uff13+5", [3, 5], 8),  # FULLWIDTH DIGIT THREE
        ("3\u00b2", [3, 2], 9),
        ("3\u00a0+5", [3, 5], 8),  # no-break space
        ("3x5", [3, 5], 15),
        ("3\u22125", [3, 5], -2),  # MINUS SIGN
        ("(3)(5)", [3, 5], 15),
        ("(3+5", [3, 5], 8),
        ("3+5)", [3, 5], 8),
        (")3+5(", [3, 5], 8),
        ("()3+5", [3, 5], 8),
        ("3+5()", [3, 5], 8),
        ("3+(5+)", [3, 5], 8),
        ("3+5+", [3, 5], 8),
        ("", [3, 5], 0),
        ("()", [3, 5], 0),
        ("3/0", [0, 3], 0),
        ("3/(5-5)", [3, 5, 5], 0),
        ("0/0", [0, 0], 0),
        ("(44**19)**(35**4)", [44, 19, 35, 4], 98),
        ("(" * 65 + "7" + ")" * 65, [7], 7),
    ],
)
def test_wrong_expressions_score_zero(expression: str, numbers: list[int], target: int) -> None:
    """Each target is what a lax reading of the text would reach."""
    assert answer(expression, numbers, target) == 0.0


def test_integers_have_at_most_nine_digits() -> None:
    """The tenth digit must not be read as the start of another number."""
    assert answer("999999999", [999999999], 999999999) == 1.0
    assert answer("1234567890", [123456789, 0], 1234567890) == 0.0


# What a response looks like, and whether its answer is the final one by default and by the authors.
LAYOUTS = [
    ("<think>hm</think><answer>3+5</answer>", 1, 1),
    ("<think>hm</think>\n<answer> 3+5 </answer> \r\n\t", 1, 1),
    ("hm</think>\n<answer> 3+5 </answer> \r\n\t", 1, 0),  # the prompt held the opening tag
    ("So: <think>\n1 < 2 <answer? \n</think><answer>3+5</answer>", 1, 1),
    # tags that the thought mentions
    ("<think>hm<answer>1</answer></think><answer>3+5</answer>", 1, 1),
    ("<think>I end with <answer> </answer>.</think> <answer>3+5</answer>", 1, 1),
    ("<think>in <answer>, or </answer>?</think><answer>3+5</answer>", 1, 1),
    ("<think>now </think> and </answer><answer>\n</think><answer>3+5</answer>", 1, 1),
    ("<think><think>hm</think><answer>3+5</answer>", 1, 1),
    ("<think>hm</think></think><answer>3+5</answer>", 1, 1),
    ("<think>hm</think><think>hm</think><answer>3+5</answer>", 1, 1),
    # words between thought and answer, or behind it
    ("<think>hm</think> thus <answer>3+5</answer>", 1, 0),
    ("<think>hm</think><answer>3+5</answer>.", 1, 0),
    ("<think>hm</think><answer>3+5</answer>\u00a0", 1, 0),
    ("<think>hm</think><answer>3+5</answer></answer>", 1, 0),
    ("<think>hm</think><answer>3+5</answer><answer>", 1, 0),
    ("<think>hm</think><answer>3+5</answer> <think>", 1, 0),
    ("<think>hm</think><answer>1</answer><answer>3+5</answer>", 1, 0),  # the last one
    ("<think>hm</think><answer><answer>3+5</answer>", 1, 0),
    # another one is the last, or there is none
    ("<think>hm</think><answer>3+5</answer><answer>1</answer>", 0, 0),
    ("<think>hm</think><answer>3+5<answer>1</answer></answer>", 0, 0),
    ("3+5", 0, 0),
    ("", 0, 0),
    ("<answer>3+5</answer>", 0, 0),  # no thought has ended
    ("<think>hm<answer>3+5</answer>", 0, 0),
    ("<think>hm</think>3+5", 0, 0),
    ("<think>hm</think><answer>3+5", 0, 0),
    ("<think>hm</think>3+5</answer>", 0, 0),
    ("<think>hm</think></answer>3+5<answer>", 0, 0),
    ("</think><think><answer>3+5</answer>", 0, 0),  # a thought that does not end
    ("hm</think><answer><think>3+5</answer>", 0, 0),
    ("<answer>3+5</answer><think>hm</think>", 0, 0),
    ("<think>hm</think><answer>3+5</answer></think>", 0, 0),
    ("<answer>3+5</think></answer>", 0, 0),
    ("<THINK>hm</THINK><ANSWER>3+5</ANSWER>", 0, 0),
    ("<think>hm</think><answer >3+5</answer>", 0, 0),
    ("<think>hm</think><answer>3+5</ answer>", 0, 0),
]


@pytest.mark.parametrize(("response", "usual", "strict"), LAYOUTS)
def test_the_final_answer_is_the_last_one_behind_the_thought(
    response: str, usual: int, strict: int
) -> None:
    """The expression itself is right in all of them."""
    assert score_countdown(response, [3, 5], 8) == usual
    assert score_countdown(response, [3, 5], 8, strict=True) == strict


@pytest.mark.parametrize(
    ("response", "usual", "strict"),
    [
        ("<think>hm <answer>3+5</answer>\n", 1, 1),
        ("It is <answer>3+5</answer>", 1, 1),
        ("<answer>1</answer><answer>3+5</answer>", 1, 1),
        ("<think><answer>1</answer></think><answer>3+5</answer>", 1, 1),
        ("<think>hm</think> so <answer>3+5</answer>", 1, 0),
        ("<answer>3+5</answer> ok", 1, 0),
        ("<answer>3+5</answer><answer>1</answer>", 0, 0),
        ("<answer>3+5</answer></think>", 0, 0),
    ],
)
def test_answer_format_needs_no_thought(response: str, usual: int, strict: int) -> None:
    found = [
        score_countdown(response, [3, 5], 8, format="answer", strict=strictly)
        for strictly in (False, True)
    ]
    assert found == [usual, strict]


PARTS = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "3+5", "1", " ", "x"])


@given(st.lists(PARTS, max_size=9).map("".join), st.sampled_from(["think_answer", "answer"]))
def test_the_final_answer_by_another_way_to_find_it(response: str, form: Any) -> None:
    """Blocks by a regular expression; nothing that is strictly right is wrong otherwise."""
    *_, rest = response.split("</think>")
    blocks = [*re.finditer(r"<answer>((?:(?!<answer>).)*?)</answer>", rest)]
    think = form == "think_answer"
    thought = "</think>" in response
    known = bool(blocks) and (thought or not think)
    strict = False
    if known:
        before, after = rest[: blocks[-1].start()], rest[blocks[-1].end() :]
        known = blocks[-1][1].strip() == "3+5" and not (think and "<think>" in before)
        strict = known and not after.strip() and not (thought and before.strip())
        begun = "<think>" in response[: response.rfind("</think>")]
        strict = strict and (begun or not think)
    assert score_countdown(response, [3, 5], 8, format=form) == known
    assert score_countdown(response, [3, 5], 8, format=form, strict=True) == strict


@pytest.mark.parametrize(
    ("response", "numbers", "target"),
    [
        ("3 * 4 = 12 , 12 + 5 = 17", [3, 4, 5], 17),
        ("3*4=12,5+12=17\n", [5, 4, 3], 17),
        ("3 - 5 = -2 , -2 + 7 = 5", [3, 5, 7], 5),
        ("3-5=-2,7--2=9", [3, 5, 7], 9),
        ("3 - 5 = -2", [3, 5], -2),
        ("4 - 4 = 0 , 0 * 9 = 0 , 7 + 0 = 7", [4, 4, 7, 9], 7),
        ("8 / 2 = 4 , 4 * 4 = 16", [2, 4, 8], 16),  # a result equal to a given number
        ("1+2=3 , 3+4=7 , 3+7=10", [1, 2, 3, 4], 10),
        ("6\u00d74=24 , 24\u00f73=8", [3, 4, 6], 8),
    ],
)
def test_right_steps_score_one(response: str, numbers: list[int], target: int) -> None:
    """Chains whose every step is right by hand; another target must score 0."""
    assert score_countdown(response, numbers, target, format="steps") == 1.0
    assert score_countdown(response, numbers, target + 1, format="steps") == 0.0


@pytest.mark.parametrize(
    ("response", "numbers", "target"),
    [
        ("3 * 4 = 12", [3, 4, 5], 12),  # a number left over
        ("3 * 4 = 13 , 13 + 5 = 18", [3, 4, 5], 18),  # false step
        ("3 * 4 = 12 , 12 + 5 = 18", [3, 4, 5], 18),  # false last step
        ("3 * 4 = 12 , 3 + 5 = 8", [3, 4, 5], 8),  # 3 is gone
        ("3 + 3 = 6 , 6 + 5 = 11", [3, 4, 5], 11),  # 3 is there once
        ("3 + 4 = 7 , 12 + 5 = 17", [3, 4, 5], 17),  # 12 from nowhere
        ("7 / 2 = 3 , 3 + 5 = 8", [2, 5, 7], 8),  # floor division
        ("7 / 2 = 3.5 , 3.5 * 2 = 7", [2, 2, 7], 7),
        ("5 / 0 = 0 , 0 + 8 = 8", [0, 5, 8], 8),
        ("3 + 4 = 7 , 7 + 5 = 12 , 12 + 0 = 12", [3, 4, 5], 12),
        ("3 + 4 + 5 = 12", [3, 4, 5], 12),
        ("3 + 4 = 7 , 7 + 5 = 12 ,", [3, 4, 5], 12),
        ("3 + 4 = 7 ; 7 + 5 = 12", [3, 4, 5], 12),
        ("so 3 + 5 = 8", [3, 5], 8),
        ("3 + 5 = 8 .", [3, 5], 8),
        ("3 + 5 = 08", [3, 5], 8),
        ("3 - 3 = -0", [3, 3], 0),
        ("3 - 5 = - 2", [3, 5], -2),
        ("3 + 5 = 8 = 8", [3, 5], 8),
        ("3 + 5 = \u0668", [3, 5], 8),
        ("2 ** 5 = 32", [2, 5], 32),
        ("999999999 * 999999999 = 999999998000000001", [999999999] * 2, 999999998000000001),
        ("<answer>3 + 5 = 8</answer>", [3, 5], 8),
        ("8", [8], 8),
        ("", [8], 8),
    ],
)
def test_wrong_steps_score_zero(response: str, numbers: list[int], target: int) -> None:
    """One fault each."""
    assert score_countdown(response, numbers, target, format="steps") == 0.0


def test_max_chars_counts_the_whole_response() -> None:
    """The longest allowed response scores, one character more does not."""
    response = "<answer>3+5</answer>"
    assert score_countdown(response, [3, 5], 8, format="answer", max_chars=20) == 1.0
    assert score_countdown(response + " ", [3, 5], 8, format="answer", max_chars=20) == 0.0


@pytest.mark.parametrize("max_chars", [16384, 10**7])
@pytest.mark.parametrize(
    "response",
    [
        "<think><answer>" * 800,
        "<answer>1</answer>" * 800,
        "</think>" * 100_000 + "<answer>" * 100_000,
        "</think>" + "</answer><answer>" * 100_000,
        "</think>" + "<answer>" * 100_000 + "</answer>" * 100_000,
        "</think>" + "<answer>x</answer>" * 50_000,
        "<think>" * 100_000,
        "<" * 1_000_000,
        "(" * 1_000_000,
        "<answer>" + "(" * 1_000_000 + "</answer>",
        "</think><answer>" + "1+" * 500_000 + "1</answer>",
        "</think><answer>" + "9" * 1_000_000 + "</answer>",
        "</think><answer>9" + "**9" * 300_000 + "</answer>",
        "</think><answer>(44**19)**(35**4)</answer>",
        "<answer>1</answer>" + " " * 1_000_000 + "x",
        "1+1=1," * 200_000,
        "1" + " " * 1_000_000,
        "9" * 1_000_000 + "=",
        "\x00\ud800</think><answer>\udfff\x00</answer>",
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_hostile_texts_score_zero(response: str, max_chars: int) -> None:
    """Catches evaluation, backtracking, recursion and anything quadratic, even past the cap."""

    def check() -> None:
        for form in get_args(Format):
            options = {"format": form, "max_chars": max_chars, "strict": form == "answer"}
            assert score_countdown(response, [1, 44, 19, 35], 98, **options) == 0.0

    assert runs.exit_code(runs.forked(check), seconds=60) == 0  # not None: it hangs


@given(
    st.text(alphabet=st.characters(), max_size=60)
    | st.text(alphabet="123+-*/()= ,<>\u00d7\ud800\x00", max_size=40),
    st.sampled_from(["{}", "<answer>{}</answer>", "</think><answer>{}</answer>"]),
    st.sampled_from(get_args(Format)),
)
def test_any_text_scores_zero_or_one(text: str, layout: str, form: Any) -> None:
    """No text raises, and the score is a float."""
    score = score_countdown(layout.replace("{}", text), [1, 2, 3], 6, format=form)
    assert type(score) is float
    assert score in (0.0, 1.0)


def oracle(expression: str) -> tuple[list[int], Fraction] | None:
    """Numbers and value by Python's own grammar, None if it is no plain arithmetic."""
    operators: dict[type, Any] = {
        ast.Add: Fraction.__add__,
        ast.Sub: Fraction.__sub__,
        ast.Mult: Fraction.__mul__,
        ast.Div: Fraction.__truediv__,
    }
    numbers = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.BinOp(left, op, right) if type(op) in operators:
                result: Fraction = operators[type(op)](value(left), value(right))
                return result
        raise SyntaxError

    try:
        result = value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None
    return numbers, result


operands = st.integers(0, 12).map(str)
expressions = st.recursive(
    operands,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join), inner.map("( {} )".format)
    ),
    max_leaves=6,
)


@given(expressions)
def test_well_formed_expressions_agree_with_python(expression: str) -> None:
    """Value, precedence and associativity are those of Python's grammar in exact arithmetic."""
    numbers = [int(token) for token in expression.split() if token.isdigit()]
    known = oracle(expression)
    if known is None or known[1].denominator != 1:
        whole = 0 if known is None else round(known[1])
        assert answer(expression, numbers, whole) == 0.0
    else:
        assert sorted(known[0]) == sorted(numbers)
        assert answer(expression, numbers, int(known[1])) == 1.0
        assert answer(expression.replace(" ", ""), numbers[::-1], int(known[1])) == 1.0
        assert answer(expression, [*numbers, 1], int(known[1])) == 0.0


@given(expressions, st.data())
def test_damaged_expressions_agree_with_python(expression: str, data: st.DataObject) -> None:
    """Whatever a changed token makes of the text, it scores 1 only if Python accepts it too."""
    tokens = expression.split()
    place = data.draw(st.integers(0, len(tokens) - 1))
    width = data.draw(st.integers(0, 1))
    tokens[place : place + width] = data.draw(
        st.lists(st.sampled_from(["+", "-", "*", "/", "(", ")", "3"]), max_size=2)
    )
    text = " ".join(tokens).replace("* *", "**").replace("/ /", "//")
    numbers = [int(token) for token in tokens if token.isdigit()] or [3]
    known = oracle(text.strip())
    target = 0 if known is None else round(known[1])
    expected = known is not None and known[1] == target
    assert answer(text, numbers, target) == float(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": None}, "response=None"),
        ({"response": b"3"}, "response="),
        ({"numbers": []}, r"numbers=\[\]"),
        ({"numbers": [3, 5.0]}, "numbers="),
        ({"numbers": [3, True]}, "numbers="),
        ({"numbers": [3, -5]}, "numbers="),
        ({"numbers": [10**9]}, "numbers="),
        ({"numbers": "35"}, "numbers="),
        ({"numbers": 35}, "numbers=35"),
        ({"target": "8"}, "target='8'"),
        ({"target": 8.0}, "target=8.0"),
        ({"target": True}, "target=True"),
        ({"format": "boxed\n"}, "format='boxed"),
        ({"max_chars": 0}, "max_chars=0"),
        ({"max_chars": None}, "max_chars=None"),
    ],
)
def test_bad_arguments_raise_one_line(change: dict[str, Any], message: str) -> None:
    """A wrong argument is the caller's bug: it must not pass for a wrong response."""
    arguments: dict[str, Any] = {"response": "", "numbers": [3, 5], "target": 8} | change
    with pytest.raises(ValueError, match=f"^{message}") as error:
        score_countdown(**arguments)
    assert "\n" not in str(error.value)
