"""Plain numbers: integers, decimals, fractions, mixed numbers, powers of integers. Exact."""

import re
from fractions import Fraction

from tre_lightning.tasks.mathematics.grading.limits import MAX_BITS
from tre_lightning.tasks.mathematics.grading.tree import Group, Items, argument_items, flat

INTEGER = re.compile(r"[0-9]+")


def read_number(items: Items) -> Fraction | None:
    """Value of a plain number, None if it is not one."""
    if items and items[0] in ("-", "+"):
        value = read_number(items[1:]) if items[1:2] not in (("-",), ("+",)) else None
        return None if value is None else (-value if items[0] == "-" else value)
    match items:
        case (Group(open="(", items=inner),):
            return read_number(inner)
        case (str(digits),) if is_digits(digits):
            return Fraction(digits)
        case ("\\frac", upper, lower):
            return quotient(read_number(argument_items(upper)), read_number(argument_items(lower)))
        case (str(upper), "/", str(lower)) if is_digits(upper) and is_digits(lower):
            return quotient(Fraction(upper), Fraction(lower))
        case (str(whole), "\\frac", upper, lower) if INTEGER.fullmatch(whole):
            return _mixed(whole, argument_items(upper), argument_items(lower))
        case (str(whole), str(upper), "/", str(lower)) if INTEGER.fullmatch(whole):
            return _mixed(whole, (upper,), (lower,))
        case (str(head), "\\bar", tail) if is_digits(head) and "." in head:
            return _repeating(head, "".join(flat(argument_items(tail))))
        case (str(base), "^", exponent) if INTEGER.fullmatch(base):
            return exact_power(Fraction(base), read_number(argument_items(exponent)))
        case (str(factor), "*", "10", "^", exponent) if is_digits(factor):
            power = exact_power(Fraction(10), read_number(argument_items(exponent)))
            return None if power is None else Fraction(factor) * power
    return None


def is_digits(token: str) -> bool:
    """Whether a token is an integer or a decimal."""
    return token[0] in "0123456789." and token != "."


def quotient(upper: Fraction | None, lower: Fraction | None) -> Fraction | None:
    """Upper over lower, None if there is none."""
    return None if upper is None or not lower else upper / lower


def exact_power(base: Fraction, exponent: Fraction | None) -> Fraction | None:
    """The power if it is a fraction of acceptable size, else None."""
    if exponent is None or exponent.denominator != 1 or (not base and exponent <= 0):
        return None
    bits = abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if bits <= MAX_BITS else None


def _mixed(whole: str, upper: Items, lower: Items) -> Fraction | None:
    texts = ["".join(flat(part)) for part in (upper, lower)]
    if not all(INTEGER.fullmatch(text) for text in texts):
        return None
    top, bottom = map(int, texts)
    return int(whole) + Fraction(top, bottom) if 0 < top < bottom else None


def _repeating(head: str, period: str) -> Fraction | None:
    if not INTEGER.fullmatch(period):
        return None
    places = len(head.partition(".")[2])
    return Fraction(head) + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
