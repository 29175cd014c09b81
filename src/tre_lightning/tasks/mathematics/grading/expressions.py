"""Expressions: their numbers, their variables, and LaTeX that is safe for the grammar."""

from fractions import Fraction

from tre_lightning.tasks.mathematics.grading.forms import Value
from tre_lightning.tasks.mathematics.grading.limits import MAX_EXPONENT, MAX_FACTORIAL
from tre_lightning.tasks.mathematics.grading.numbers import INTEGER, is_digits, read_number
from tre_lightning.tasks.mathematics.grading.tree import (
    Group,
    Items,
    Unreadable,
    argument_items,
    flat,
)
from tre_lightning.tasks.mathematics.grading.vocabulary import FUNCTIONS, GREEK, SCALES


def read_value(items: Items, unit: str = "") -> Value:
    r"""The items as an expression.

    Raises:
        Unreadable: where there are none, for words among them, and for ``\sqrt{2} million``.
    """
    if not items:
        raise Unreadable
    while items[0] == "+" and len(items) > 1:
        items = items[1:]
    tokens = tuple(flat(items))
    if any(token.startswith('"') for token in tokens):
        raise Unreadable
    number = read_number(items)
    scale, _, rest = unit.partition(" ")
    if scale in SCALES:
        if number is None:
            raise Unreadable
        return Value((*tokens, unit), number * SCALES[scale], None, frozenset(), frozenset(), rest)
    features = features_of(tokens)
    try:
        latex = _Writer(degrees="trigonometric" in features).write(items)
    except Unreadable:
        latex = None
    names = frozenset(token for token in tokens if token.isalpha() or token in GREEK) - {"e", "i"}
    return Value(tokens, number, latex, names, features, unit)


def features_of(tokens: tuple[str, ...]) -> frozenset[str]:
    """Features that an answer may have only if the gold has them, such as a copied integral."""
    found = {FUNCTIONS[token[1:]] for token in tokens if token[1:] in FUNCTIONS}
    found.discard("exponential")  # e^x
    marks = {
        "!": "factorial",
        "\\binom": "factorial",
        "|": "absolute",
        "\\lfloor": "rounding",
        "\\lceil": "rounding",
    }
    found |= {marks[token] for token in tokens if token in marks}
    if any(token.isalpha() for token in tokens):
        found.discard("absolute")  # of a variable it is an answer, of a number a question
    return frozenset(found)


class _Writer:
    """Writes an expression out for the grammar: each factor, argument and product explicit.

    Raises `Unreadable` for everything that is not on its list.
    """

    def __init__(self, degrees: bool) -> None:
        self._degrees = degrees

    def write(self, items: Items) -> str:
        """LaTeX of a sum."""
        out: list[str] = []
        i = 0
        after = "operator"  # or "factor", "quotient": a factor that a slash came before
        while i < len(items):
            item = items[i]
            if item in ("+", "-"):
                if after == "operator" and out and out[-1] in "+-":
                    raise Unreadable
                out.append(str(item))
                after, i = "operator", i + 1
            elif item in ("*", "/"):
                if after == "operator":
                    raise Unreadable
                out.append("\\cdot " if item == "*" else "/")
                after, i = ("operator" if item == "*" else "slash"), i + 1
            else:
                if after == "quotient":
                    raise Unreadable  # 1/2x
                if after == "factor":
                    out.append("\\cdot ")
                text, i = self._factor(items, i)
                out.append(text)
                after = "quotient" if after == "slash" else "factor"
        if after in ("operator", "slash"):
            raise Unreadable
        return "".join(out)

    def _factor(self, items: Items, i: int) -> tuple[str, int]:
        """LaTeX of the factor that starts at i, with its exponent, and where it ends."""
        start = i
        text, i = self._base(items, i)
        while i < len(items) and items[i] in ("^", "!"):
            if items[i] == "!":
                self._check_factorial(items[start:i])
                text, i = f"{text}!", i + 1
                continue
            if i + 1 >= len(items):
                raise Unreadable
            exponent = argument_items(items[i + 1])
            if exponent == ("\\circ",):
                if not self._degrees:
                    raise Unreadable
                text = rf"({text}\cdot \frac{{\pi}}{{180}})"
            else:
                text = f"{text}^{{{self._exponent(exponent)}}}"
            i += 2
            if i < len(items) and items[i] == "^":
                raise Unreadable
        return text, i

    def _base(self, items: Items, i: int) -> tuple[str, int]:
        item = items[i]
        if isinstance(item, Group):
            return self._delimited(item), i + 1
        if is_digits(item):
            return self._digits(items, i)
        if item == "\\frac":
            upper, lower = self._arguments(items, i, 2)
            return rf"\frac{{{self.write(upper)}}}{{{self.write(lower)}}}", i + 3
        if item == "\\binom":
            parts = self._arguments(items, i, 2)
            for part in parts:
                self._check_factorial(part)
            return rf"\binom{{{self.write(parts[0])}}}{{{self.write(parts[1])}}}", i + 3
        if item == "\\sqrt":
            index = items[i + 1] if i + 1 < len(items) else ""
            if isinstance(index, Group) and index.open + index.close == "[]":
                (radicand,) = self._arguments(items, i + 1, 1)
                return rf"\sqrt[{self._exponent(index.items)}]{{{self.write(radicand)}}}", i + 3
            (radicand,) = self._arguments(items, i, 1)
            return rf"\sqrt{{{self.write(radicand)}}}", i + 2
        if _is_function(item):
            return self._function(items, i)
        if item == "\\pi":
            return "\\pi ", i + 1
        if item.isalpha() or item in GREEK:
            return self._symbol(items, i)
        raise Unreadable

    def _digits(self, items: Items, i: int) -> tuple[str, int]:
        digits = str(items[i])
        following = items[i + 1 : i + 4]
        if following[:1] == ("\\frac",) and INTEGER.fullmatch(digits):
            fraction = read_number(following)
            if fraction is not None:
                mixed = read_number((digits, *following))
                if mixed is None:
                    raise Unreadable  # 2\frac{3}{2}: a product?
                return _fraction_latex(mixed), i + 4
        if following and isinstance(following[0], str) and is_digits(following[0]):
            raise Unreadable  # 2 3
        return _fraction_latex(Fraction(digits)), i + 1

    def _symbol(self, items: Items, i: int) -> tuple[str, int]:
        name = str(items[i])
        after = items[i + 1] if i + 1 < len(items) else ""
        if isinstance(after, Group) and after.open == "(" and name in "fghFGHPQ":
            raise Unreadable  # a function, not a product
        name = {"d": "\\zeta "}.get(name, name + " ")  # the grammar takes dx for a differential
        if after != "_":
            return name, i + 1
        if i + 2 >= len(items):
            raise Unreadable
        index = "".join(flat(argument_items(items[i + 2])))
        if not index.isalnum():
            raise Unreadable
        return f"{name.strip()}_{{{index}}}", i + 3

    def _function(self, items: Items, i: int) -> tuple[str, int]:
        name = str(items[i])
        i += 1
        for mark in ("_", "^", "_"):
            if items[i : i + 1] == (mark,) and i + 1 < len(items):
                name += f"{mark}{{{self._exponent(argument_items(items[i + 1]))}}}"
                i += 2
        if i >= len(items):
            raise Unreadable
        first = items[i]
        if isinstance(first, Group) and first.open == "(":
            return f"{name}({self.write(first.items)})", i + 1
        end = i  # \sin 2x: all factors up to an operator or the next function
        while end < len(items):
            item = items[end]
            if item in ("+", "-", "*", "/") and end > i:
                break
            if _is_function(item):
                break
            if isinstance(item, Group) and item.open == "(":
                raise Unreadable  # \sin x(x+1)
            end += 1
        return f"{name}({self.write(items[i:end])})", end

    def _delimited(self, group: Group) -> str:
        inner = self.write(group.items)
        if group.open in ("\\lfloor", "\\lceil"):
            return f"{group.open} {inner}{group.close} "
        if group.open == "|":
            return f"|{inner}|"
        if group.open + group.close in ("()", "[]"):
            return f"({inner})"
        raise Unreadable

    def _arguments(self, items: Items, i: int, count: int) -> list[Items]:
        arguments = items[i + 1 : i + 1 + count]
        if len(arguments) < count:
            raise Unreadable
        return [argument_items(argument) for argument in arguments]

    def _exponent(self, items: Items) -> str:
        tokens = list(flat(items))
        if "!" in tokens or any(
            is_digits(token) and Fraction(token) > MAX_EXPONENT for token in tokens
        ):
            raise Unreadable
        if "^" in tokens and not any(token.isalpha() or token in GREEK for token in tokens):
            raise Unreadable  # a tower
        return self.write(items)

    def _check_factorial(self, items: Items) -> None:
        for token in flat(items):
            if token in ("^", "!", "\\frac", "*", "\\binom") or (
                is_digits(token) and Fraction(token) > MAX_FACTORIAL
            ):
                raise Unreadable


def _is_function(item: str | Group) -> bool:
    return isinstance(item, str) and item.startswith("\\") and item[1:] in FUNCTIONS


def _fraction_latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
