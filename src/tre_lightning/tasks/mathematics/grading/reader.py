"""Reads the form of an answer from its tree, or nothing if the text is of no known kind."""

import functools
import re
from fractions import Fraction

from tre_lightning.tasks.mathematics.grading.expressions import read_value
from tre_lightning.tasks.mathematics.grading.forms import (
    Based,
    Bracketed,
    Equation,
    Form,
    Inequality,
    Many,
    Matrix,
    Named,
    Ratio,
    Text,
    Value,
)
from tre_lightning.tasks.mathematics.grading.numbers import INTEGER
from tre_lightning.tasks.mathematics.grading.tree import (
    Group,
    Items,
    Unreadable,
    argument_items,
    flat,
    split,
    to_tree,
)
from tre_lightning.tasks.mathematics.grading.units import without_unit
from tre_lightning.tasks.mathematics.grading.vocabulary import GREEK

_SEPARATORS = frozenset([",", ";", "OR", "AND"])
_RELATIONS = frozenset(["=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx"])
_FLIPPED = {">": "<", "\\ge": "\\le"}
_INFINITY: Items = ("\\infty",)
_MINUS_INFINITY: Items = ("-", "\\infty")


@functools.lru_cache(maxsize=4096)
def read(text: str, thousands: bool) -> Form | None:
    """The form of a text; None if it has none; see `to_tree` for `thousands`."""
    try:
        return _list(to_tree(text, thousands))
    except Unreadable:
        return None


def _list(items: Items) -> Form:
    while items and items[-1] in (".", ",", ";"):
        items = items[:-1]
    parts, marks = split(items, _SEPARATORS)
    for i in range(len(marks) - 1, 0, -1):  # ", and" is one separator
        if not parts[i]:
            del parts[i], marks[i - 1]
    forms = [_element(single) for part in parts for single in _signs(part)]
    if len(forms) == 1:
        return forms[0]
    if set(marks) == {"OR"}:
        union = _union_of_named(forms)
        if union is not None:
            return union
    return Many("list", tuple(forms))


def _signs(items: Items) -> list[Items]:
    r"""The items with ``\pm`` as plus and as minus; ``\mp`` the other way round."""
    signs = [token for token in flat(items) if token in ("\\pm", "\\mp")]
    if not signs:
        return [items]
    if len(signs) > 1:
        raise Unreadable  # two or four values?
    return [_replaced(items, signs[0], sign) for sign in "+-"]


def _replaced(items: Items, old: str, new: str) -> Items:
    return tuple(
        item._replace(items=_replaced(item.items, old, new))
        if isinstance(item, Group)
        else (new if item == old else item)
        for item in items
    )


def _union_of_named(forms: list[Form]) -> Form | None:
    r"""``x<1 \text{ or } x>3`` as a union of intervals."""
    names: set[str] = set()
    pieces: list[Form] = []
    for form in forms:
        if not isinstance(form, Named):
            return None
        names.add(form.name)
        pieces.append(form.form)
    if not any(isinstance(piece, Bracketed) for piece in pieces):
        return None
    return Named(names.pop(), Many("union", tuple(pieces))) if len(names) == 1 else None


def _element(items: Items) -> Form:
    parts, signs = split(items, _RELATIONS)
    if not signs:
        return _term(items)
    if "\\approx" in signs:
        return _approximation(items, parts, signs)
    if set(signs) == {"="}:
        return _equation(parts)
    if signs == ["\\in"]:
        if not (name := _name(parts[0])):
            raise Unreadable
        return Named(name, _term(parts[1]))
    if signs == ["\\ne"]:
        return _unequal(parts)
    return _inequality(parts, signs)


def _approximation(items: Items, parts: list[Items], signs: list[str]) -> Form:
    """The exact value, where one is given; it must round to the other."""
    if signs.index("\\approx") != len(signs) - 1:
        raise Unreadable
    if not parts[0]:
        return _term(parts[1])
    if len(parts) == 2 and (name := _name(parts[0])):
        return Named(name, _term(parts[1]))
    exact, rounded = _element(items[: items.index("\\approx")]), _term(parts[-1])
    last = exact.form if isinstance(exact, Named) else exact
    if isinstance(last, Value) and isinstance(rounded, Value) and last.number is not None:
        places = len(rounded.key[-1].partition(".")[2])
        error = abs(last.number - rounded.number) if rounded.number is not None else 1
        if error * 2 > Fraction(1, 10**places):
            raise Unreadable
    return exact


def _equation(parts: list[Items]) -> Form:
    if len(parts) == 2 and not _name(parts[0]) and _name(parts[1]):
        parts = parts[::-1]
    names = []
    while len(parts) > 1:
        name = _name(parts[0])
        if not name or any(name in flat(part) for part in parts[1:]):
            break
        names.append(name)
        parts = parts[1:]
    form = _term(parts[0]) if len(parts) == 1 else Equation(tuple(_term(p) for p in parts))
    return Named("=".join(names), form) if names else form


def _name(items: Items) -> str:
    r"""A name such as ``x``, ``a_1``, ``f(x)``, ``AB``, ``(x,y)`` or a text; "" if it is none."""
    if not items:
        return ""
    first, rest = items[0], items[1:]
    if isinstance(first, Group):
        parts, _ = split(first.items, frozenset([","]))
        names = [_name(part) for part in parts]
        return ",".join(names) if first.open == "(" and not rest and all(names) else ""
    if first.startswith('"'):
        return first if not rest else ""
    if first in ("\\angle", "\\triangle") and rest:
        return first + inner if (inner := _name(rest)) else ""
    if not (first.isalpha() or first in GREEK):
        return ""
    name = first
    while rest and isinstance(rest[0], str) and rest[0].isalpha() and rest[0].isupper():
        name, rest = name + rest[0], rest[1:]  # AB, a segment
    while len(rest) >= 2 and rest[0] == "_":
        name, rest = name + "_" + "".join(flat(argument_items(rest[1]))), rest[2:]
    if rest and isinstance(rest[0], Group) and rest[0].open == "(":
        name, rest = name + "(" + "".join(flat(rest[0].items)) + ")", rest[1:]
    return name if not rest else ""


def _interval(low: Items, left: str, high: Items, right: str) -> Bracketed:
    return Bracketed(left, right, (_term(low), _term(high)))


def _unequal(parts: list[Items]) -> Form:
    if not (name := _name(parts[0])):
        raise Unreadable
    below = _interval(_MINUS_INFINITY, "(", parts[1], ")")
    above = _interval(parts[1], "(", _INFINITY, ")")
    return Named(name, Many("union", (below, above)))


def _inequality(parts: list[Items], signs: list[str]) -> Form:
    if all(sign in _FLIPPED for sign in signs):
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if not all(sign in _FLIPPED.values() for sign in signs):
        raise Unreadable
    brackets = {"<": "()", "\\le": "[]"}
    names = [_name(part) for part in parts]
    if len(parts) == 3 and names[1]:
        left, right = brackets[signs[0]][0], brackets[signs[1]][1]
        return Named(names[1], _interval(parts[0], left, parts[2], right))
    if len(parts) == 2 and names[0] and not names[1]:
        right = brackets[signs[0]][1]
        return Named(names[0], _interval(_MINUS_INFINITY, "(", parts[1], right))
    if len(parts) == 2 and names[1] and not names[0]:
        left = brackets[signs[0]][0]
        return Named(names[1], _interval(parts[0], left, _INFINITY, ")"))
    return Inequality(tuple(signs), tuple(_term(part) for part in parts))


def _term(items: Items) -> Form:
    if not items:
        raise Unreadable
    if "\\cup" in items:
        parts, _ = split(items, frozenset(["\\cup"]))
        return Many("union", tuple(_term(part) for part in parts))
    if len(items) == 1 and isinstance(items[0], Group):
        return _group(items[0])
    if all(isinstance(item, str) and item.startswith('"') for item in items):
        return Text(_words(" ".join(str(item)[1:] for item in items)))
    items, unit = without_unit(items)
    if len(items) == 1 and isinstance(items[0], Group) and not unit:
        return _group(items[0])
    if ":" in items:
        parts, _ = split(items, frozenset([":"]))
        return Ratio(tuple(read_value(part) for part in parts), unit)
    based = _based(items)
    if based is not None and not unit:
        return based
    return read_value(items, unit)


def _words(text: str) -> str:
    words = re.findall(r"\w+|[^\w\s.,;:?'\"]", text)
    if not words:
        raise Unreadable
    return " ".join(words[1:] if words[0] in ("a", "an", "the") and len(words) > 1 else words)


def _group(group: Group) -> Form:
    if group.open.startswith("\\begin"):
        rows, _ = split(group.items, frozenset(["\\\\"]))
        cells = [split(row, frozenset(["&"]))[0] for row in rows if row]
        return Matrix(tuple(tuple(_term(cell) for cell in row) for row in cells))
    if group.open == "\\{":
        inner = _list(group.items) if group.items else Many("list", ())
        return inner if isinstance(inner, Many) else Many("list", (inner,))
    if group.open in "([":
        parts, marks = split(group.items, frozenset([",", ";"]))
        if marks:
            return Bracketed(group.open, group.close, tuple(_term(part) for part in parts))
        if group.open + group.close == "()":
            only = group.items[0] if len(group.items) == 1 else ""
            if isinstance(only, Group) and only.open.startswith("\\begin"):
                return _group(only)
            return _term(group.items)
        if len(group.items) == 1 and isinstance(group.items[0], Group):
            return _group(group.items[0])  # [\begin{array}...]
    return read_value((group,))


def _based(items: Items) -> Based | None:
    r"""``43_5``, ``2A_{12}``, ``-1_{2}``; None if it is no such number."""
    sign = items[0] == "-"
    body = items[1:] if sign else items
    if len(body) < 3 or body[-2] != "_":
        return None
    base = "".join(flat(argument_items(body[-1])))
    digits = "".join(item if isinstance(item, str) else "?" for item in body[:-2])
    if not (INTEGER.fullmatch(base) and re.fullmatch(r"[0-9A-Z.]*[0-9][0-9A-Z.]*", digits)):
        return None
    return Based("-" * sign + digits, int(base))
