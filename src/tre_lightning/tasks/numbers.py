"""The numbers written in a text, and the last one as an answer; exact, and linear in the text.

A number is a run of digits, with a sign, commas between thousands and a decimal point, as
``-1,234.5``. Digits of other scripts, superscripts and fractions of one character are numbers as
well, but no readable ones: they equal nothing. Numbers in words are text.
"""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

_FOREIGN = "\ufffe"  # stands for a digit that is not of ASCII; no text has this character
_DIGIT = f"[0-9{_FOREIGN}]"
_RUN = re.compile(rf"(?:(?<![\w.])\.)?{_DIGIT}+(?:[.,]{_DIGIT}+)*")
_PLAIN = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?")
_DASHES = ("-", "\N{MINUS SIGN}", "\N{EN DASH}")
# Between two numbers: the second is an operand, as in 6 + 2, 1/2, 2^{3}, \frac{1}{2} and 1e3.
_OPERATOR = re.compile(
    rf"[ \t)}}\]]*(?:[{''.join(_DASHES)}+*/^\u00d7÷·xX]|\\(?:times|cdot|div)|\}}[ \t]*\{{)+"
    r"[ \t({\[$]*|[eE:]"
)


class Written(NamedTuple):
    """A number in a text."""

    text: str
    value: Decimal | None  # None = not readable
    operand: bool  # what an operator before it asks to add, divide by, ...


def numbers_in(text: str) -> list[Written]:
    """Every number in the text, in order; any text is safe."""
    if not text.isascii():
        text = re.sub(r"[^\x00-\x7f]", _ascii_digit, text)
    found: list[Written] = []
    end = 0
    for run in _RUN.finditer(text):
        gap, end, whole = text[end : run.start()], run.end(), run[0]
        if _ends_with_sign(gap, behind_number=bool(found)):
            gap, whole = gap[:-1], f"-{whole}"
        operand = bool(found) and _OPERATOR.fullmatch(gap) is not None
        for part in [whole] if _PLAIN.fullmatch(whole) else whole.split(","):
            value = Decimal(part.replace(",", "")) if _PLAIN.fullmatch(part) else None
            found.append(Written(part, value, operand))
            operand = False
    return found


def last_number(text: str) -> Decimal | None:
    """Value of the last number in the text.

    None if there is no number, or the last one is not readable, or an operand: ``6 + 2`` gives no
    result.
    """
    written = numbers_in(text)
    return None if not written or written[-1].operand else written[-1].value


def _ends_with_sign(gap: str, *, behind_number: bool) -> bool:
    """Whether the text before a number ends with a minus sign, and no hyphen or operator."""
    if not gap.endswith(_DASHES) or re.match(r"[\w)\]}]", gap[-2:-1]):
        return False
    return not behind_number or bool(gap[:-1].strip(" \t)]}"))


def _ascii_digit(character: re.Match[str]) -> str:
    return _FOREIGN if unicodedata.category(character[0]).startswith("N") else character[0]
