"""Numbers in a text, and the last one as an answer."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tre_lightning.tasks.numbers import last_number, numbers_in


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 8.", "8"),
        ("6 + 2 = 8", "8"),
        ("6+2=8.", "8"),
        ("8", "8"),
        ("8.0", "8"),
        ("$1,234.50 a day", "1234.5"),
        ("so -8", "-8"),
        ("it is \N{MINUS SIGN}8 degrees", "-8"),
        ("5 - 13 = -8", "-8"),
        ("a half is .5", "0.5"),
        ("at the end.8", "8"),
        ("an answer-8", "8"),  # a hyphen
        ("first 6,\n- 8 marbles", "8"),  # a bullet
        ("**8**", "8"),
        (r"\(6 \times 2 = 12\)", "12"),
        ("8cm", "8"),
        ("1,2,3,8", "8"),
        ("1,234,5", "5"),
        ("8 -", "8"),
        ("8 or eight or nine", "8"),  # words are text
    ],
)
def test_the_last_number_is_read_by_its_value(text: str, value: str) -> None:
    assert last_number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "eight", "-", ".", "no number, none at all"),
        *("6 + 2", "6+2", "10 - 2", "10 -2", "10-2", "6 + -2", "(4) * (2)", "4 x 2", "4\u00d72"),
        *("16/2", r"\frac{16}{2}", "2^3", "2^{3}", "8e5", "8:30", r"4 \times 2", r"4 \cdot 2"),
        *("1.2.3", "8½", "8²", "½", "٨", "\uff18", "8٨", "Ⅷ", "① ②"),
    ],
)
def test_what_is_no_result_is_no_number(text: str) -> None:
    assert last_number(text) is None
    assert last_number(f"{text} so 8") == 8  # but what comes later counts


def test_a_list_is_many_numbers_and_glued_digits_are_one() -> None:
    assert [n.value for n in numbers_in("1,2,3 4\n5")] == [1, 2, 3, 4, 5]
    assert [n.value for n in numbers_in("12345678")] == [12345678]
    assert [n.value for n in numbers_in("-1 -2, -3")] == [-1, 2, -3]  # 1 - 2 is a difference


@given(st.text(st.sampled_from("0189.,-+/ x=\n½\uff18a\ufffe\N{MINUS SIGN}\\{}")) | st.text())
def test_any_text_is_read(text: str) -> None:
    found = numbers_in(text)
    assert (last_number(text) is None) or found[-1].value == last_number(text)
    assert len(found) <= len(text)


@given(st.integers(-(10**30), 10**30), st.integers(0, 6))
def test_a_number_that_is_written_is_read(number: int, places: int) -> None:
    value = Decimal(number).scaleb(-places)
    assert last_number(f"it is {value:f}.") == value == last_number(f"2 3 = {value:,f}")


def test_digits_without_end_are_read_in_time() -> None:
    assert last_number("9" * 10**5) == Decimal("9" * 10**5)
    assert len(numbers_in("1," * 10**4 + "8")) == 10**4 + 1
