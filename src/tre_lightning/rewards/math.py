r"""Scorer of MATH answers: 1 exactly when the last closed ``\boxed`` or ``\fbox`` equals the gold.

A trained policy finds every hole of a grader, so this one decides by itself what is compared, and
how. `last_boxed` finds the answer. A reader turns answer and gold into forms (value, list, tuple or
interval, union, matrix, equation, base-n number, ...) or refuses them; forms are matched part by
part, and plain numbers as fractions. Only what is left, two expressions such as ``2\sqrt{3}`` and
``\sqrt{12}``, goes to math-verify's LaTeX grammar (its package latex2sympy2_extended), in a worker
process that can be killed, and only as LaTeX that this module has written itself, from an
allow-list. Two expressions are equal if they have the same value at several points, exactly for
rational ones and to 120 digits for others. math-verify's extraction, normalisation and comparison
are not used: they take 1/2^98 for 1/2^99, ``3t`` for 3 and ``N`` for ``n``.

What counts as equal, where a teacher might say either:

* A unit, a currency sign, ``^\circ`` or ``\%`` may be left out or added, not replaced by another.
  ``50\%`` equals both 50 and 1/2.
* ``x=5`` equals 5; ``k=5`` does not equal ``x=5``. All parts of ``a=b=c`` must equal the gold.
* A decimal is exact: 0.5 equals 1/2, 0.333 does not equal 1/3. Fractions need not be reduced.
* ``3,5``, ``5,3``, ``\{3,5\}``, ``3 \text{ or } 5`` are one list without an order; ``(3,5)`` is a
  tuple or interval and equals none of them. ``4\pm 1`` is the list ``5,3``.
* ``x<5`` equals ``(-\infty,5)``; a factored polynomial equals the expanded one.
* ``43_5`` equals ``43_{5}`` alone: neither 43 nor 23.
* Where the gold is a plain number (integer, decimal, fraction, mixed number, power of integers),
  the answer must be one: ``48 \cdot 52`` and ``\sqrt{16}`` may be copied from the question. Nor may
  a function (sine, logarithm, factorial, ...) appear where the gold has none.
"""

import functools
import importlib.util
import math
import random
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias

from tre_lightning.rewards.workers import WorkerPool

_MAX_CHARS = 1000  # the longest gold of MATH has 159
_MAX_DEPTH = 12
_MAX_EXPONENT = 10_000
_MAX_BITS = 50_000
_MAX_FACTORIAL = 200

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed ``\boxed{...}`` or ``\fbox{...}``, None if there is none.

    Of nested boxes the outer one is the last to close. Escaped braces do not count. Linear time.
    """
    last = deque(_boxes(text), maxlen=1)
    return text[slice(*last[0])] if last else None


def boxed_answers(text: str) -> list[str]:
    r"""Contents of all closed ``\boxed{...}`` and ``\fbox{...}``, of nested ones the outermost."""
    outer: list[tuple[int, int]] = []
    for start, stop in _boxes(text):
        while outer and outer[-1][0] > start:
            outer.pop()
        outer.append((start, stop))
    return [text[start:stop] for start, stop in outer]


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Where the content of each closed box starts and stops, in the order of closing."""
    starts = [i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0]
    if not starts:
        return
    start = min(starts)
    while start and text[start - 1] == "\\":  # an escaped backslash starts no command
        start -= 1
    opened: list[int | None] = []  # for each open brace where its box begins, if it is a box's
    for token in _BOX.finditer(text, start):
        if token[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                yield begin, token.start()
        elif token[0] == "{":
            opened.append(None)
        elif len(token[0]) > 2:
            opened.append(token.end())


class _Unreadable(Exception):
    """Not a form that this module knows; nothing but the same string equals it."""


class _Undecided(Exception):
    """Two expressions are to be compared, which the parent does not do."""


# --- From text to a tree -------------------------------------------------------------------------


class _Group(NamedTuple):
    r"""Items between two delimiters; braces are "{" and "}", set braces "\{" and "\}"."""

    open: str
    close: str
    items: "_Items"


_Items: TypeAlias = "tuple[str | _Group, ...]"  # a token starting with " is a text, in lower case


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _table(text: str) -> dict[str, str]:
    """``"a b: c, d: e"`` as {"a": "c", "b": "c", "d": "e"}."""
    rows = (row.rsplit(": ", 1) for row in text.split(", "))
    return {word: value for words, value in rows for word in words.split()}


_UNICODE = str.maketrans(
    _table(
        "\N{GREEK SMALL LETTER PI}: \\pi , \N{GREEK SMALL LETTER THETA}: \\theta , "
        "\N{GREEK SMALL LETTER ALPHA}: \\alpha , \N{GREEK SMALL LETTER BETA}: \\beta , "
        "\N{INFINITY}: \\infty , \N{UNION}: \\cup , \N{ELEMENT OF}: \\in , "
        "\N{LESS-THAN OR EQUAL TO}: \\le , \N{GREATER-THAN OR EQUAL TO}: \\ge , "
        "\N{NOT EQUAL TO}: \\ne , \N{MULTIPLICATION SIGN}: \\times , \N{MIDDLE DOT}: \\cdot , "
        "\N{DIVISION SIGN}: \\div , \N{SQUARE ROOT}: \\sqrt , \N{PLUS-MINUS SIGN}: \\pm , "
        "\N{DEGREE SIGN}: ^\\circ , \N{MINUS SIGN} \N{EN DASH}: -, "
        "\N{SUPERSCRIPT TWO}: ^{2}, \N{SUPERSCRIPT THREE}: ^{3}"
    )
)
_SCAN = re.compile(
    r"\\(?:begin|end)\s*\{[A-Za-z]+\}|\\[A-Za-z]+|\\."
    r"|[0-9]+(?:\.[0-9]+|\.(?=\s*\\(?:overline|bar)\b))?|\.[0-9]+|[A-Za-z]+|\s+|.",
    re.DOTALL,
)
_SKIPPED = _set(
    r"\, \; \: \! \> \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr"
    r" \displaystyle \textstyle \scriptstyle \limits \nolimits \quad \qquad \rm \bf \it \( \) \[ \]"
    r" \phantom \boxed \fbox ~ $"
) | {"\\ "}
_ALIAS = _table(
    r"\dfrac \tfrac \cfrac: \frac, \dbinom \tbinom: \binom, \leq \leqslant: \le,"
    r" \geq \geqslant: \ge, \lt: <, \gt: >, \neq: \ne, \lbrace: \{, \rbrace: \}, \lbrack: [,"
    r" \rbrack: ], \langle: (, \rangle: ), \lvert \rvert \vert: |, \cdot \times \ast: *, \div: /,"
    r" \colon: :, \%: %, \overline: \bar"
)
_TEXT = _set(
    r"\text \mbox \hbox \textbf \textit \textrm \textnormal \textsf \texttt \emph \mathrm \mathbf"
    r" \mathit \mathsf \operatorname"
)
_FUNCTIONS = _table(
    "sin cos tan cot sec csc: trigonometric, sinh cosh tanh coth: hyperbolic,"
    " arcsin arccos arctan: inverse, log ln: logarithm, exp: exponential"
)
_NUMBER_WORDS = _table(
    "zero: 0, one: 1, two: 2, three: 3, four: 4, five: 5, six: 6, seven: 7, eight: 8, nine: 9,"
    " ten: 10, eleven: 11, twelve: 12"
)
# Words that stand beside a number without \text around them.
_BARE_WORDS = _set("cm mm km kg ft mi mph min hr hrs sec am pm th st nd rd")
_PAIRS = {
    "(": _set(") ]"),
    "[": _set(") ]"),
    "\\{": _set("\\}"),
    "{": _set("}"),
    "|": _set("|"),
    "\\lfloor": _set("\\rfloor"),
    "\\lceil": _set("\\rceil"),
    **{
        f"\\begin{{{name}}}": _set(f"\\end{{{name}}}")
        for name in ("matrix", "pmatrix", "bmatrix", "smallmatrix", "array")
    },
}
_CLOSING = frozenset(close for closes in _PAIRS.values() for close in closes)
# Groups of three digits, all with the same separator, and no digits beside them.
_GROUPED = re.compile(
    r"(?<![0-9.,])([1-9][0-9]{0,2})(\{,\}|,|\\,|\\ |~| )([0-9]{3}(?:\2[0-9]{3})*)(?!\2?[0-9])"
)


def _tree(text: str, thousands: bool) -> _Items:
    """The text as tokens grouped by their delimiters.

    Args:
        text: LaTeX of at most `_MAX_CHARS` characters.
        thousands: read ``1,234`` outside of brackets as one number, not as two.
    """
    text = re.sub(r"\\!\s*", "", text.translate(_UNICODE))
    text = _GROUPED.sub(lambda m: _join_digits(m, text, thousands), text)
    return _grouped(list(_scan(text.replace("{,}", ","))))


def _join_digits(match: re.Match[str], text: str, thousands: bool) -> str:
    before = text[: match.start()]
    inside = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    if match[2] == "," and (inside or not thousands):
        return match[0]
    return match[1] + match[3].replace(match[2], "")


def _scan(text: str) -> Iterator[str]:
    position = 0
    while match := _SCAN.match(text, position):
        token, position = match[0], match.end()
        token = _ALIAS.get(token, token)
        if token in _SKIPPED or token.isspace():
            if token in ("\\left", "\\right") and text[position : position + 1] == ".":
                position += 1
        elif token in _TEXT:
            content, position = _argument_text(text, position)
            yield from _text_tokens(content)
        elif token == "\\degree":
            yield from ("^", "\\circ")
        elif token == "\\begin{array}":
            _, position = _argument_text(text, position)
            yield token
        elif token == "\\mathbb":
            content, position = _argument_text(text, position)
            if content.strip() != "R":
                raise _Unreadable
            yield from ("(", "-", "\\infty", ",", "\\infty", ")")
        elif token.isalpha():
            yield from _word_tokens(token)
        else:
            yield token


def _argument_text(text: str, position: int) -> tuple[str, int]:
    """Raw text of the brace group that comes next, and where it ends."""
    opening = re.compile(r"\s*\{").match(text, position)
    if opening is None:
        raise _Unreadable
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, opening.end()):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[opening.end() : brace.start()], brace.end()
    raise _Unreadable


def _text_tokens(content: str) -> Iterator[str]:
    words = " ".join(content.lower().split())
    words = words.replace("a.m.", "am").replace("p.m.", "pm")
    core = words.strip(" .,;:")
    if core in ("and", "or"):
        yield core.upper()
    elif words in (",", ";", ""):
        yield from words
    elif core in _FUNCTIONS:
        yield "\\" + core
    elif core in _NUMBER_WORDS:
        yield _NUMBER_WORDS[core]
    elif counted := re.fullmatch(r"([0-9.,/]+) ([a-z .]+)", words):  # \text{5 square cm}
        yield from _scan(counted[1])
        yield '"' + counted[2]
    elif re.search(r"[a-z]{2}", re.sub(r"\b(?:and|or)\b", "", words)) or "\\" in words:
        yield '"' + words
    else:  # \text{(A)}, \text{B, C and D}, \mathbf{0}
        yield from _scan(content)


def _word_tokens(word: str) -> Iterator[str]:
    lower = word.lower()
    if lower in ("and", "or"):
        yield lower.upper()
    elif lower in _NUMBER_WORDS:
        yield _NUMBER_WORDS[lower]
    elif lower in _FUNCTIONS or lower == "sqrt":
        yield "\\" + lower
    elif len(word) > 3 or word in _BARE_WORDS:
        yield '"' + lower
    else:
        yield from word  # a product of letters


_ARITY = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "\\bar": 1, "^": 1, "_": 1}


def _grouped(tokens: list[str]) -> _Items:
    levels: list[tuple[str, list[str | _Group]]] = [("", [])]
    for token in tokens:
        innermost = levels[-1][0]
        if token in _CLOSING and token in _PAIRS.get(innermost, ()):
            opening, items = levels.pop()
            levels[-1][1].append(_Group(opening, token, _bound(items)))
        elif token in _PAIRS:
            if len(levels) > _MAX_DEPTH:
                raise _Unreadable
            levels.append((token, []))
        elif token in _CLOSING:
            raise _Unreadable
        else:
            levels[-1][1].append(token)
    if len(levels) > 1:
        raise _Unreadable
    return _bound(levels[0][1])


def _bound(items: list[str | _Group]) -> _Items:
    r"""The items with braces around each argument, and only there: ``\frac12``, ``{x}+1``."""
    bound: list[str | _Group] = []
    queue = list(reversed(items))
    while queue:
        item = queue.pop()
        if isinstance(item, _Group) and item.open == "{":
            bound.extend(item.items)  # nothing to be seen: 2{3} is 23 to the reader
            continue
        bound.append(item)
        for place in range(_ARITY.get(item, 0) if isinstance(item, str) else 0):
            if item == "\\sqrt" and queue and _opens(queue[-1], "["):
                bound.append(queue.pop())
            if not queue:
                raise _Unreadable
            argument = queue.pop()
            if isinstance(argument, str) and argument.isdecimal() and item not in ("^", "_"):
                # TeX takes one digit. \frac12 is meant so; \sqrt12 and \frac{1}23 may not be.
                if len(argument) == 2 and place == 0 and item == "\\frac":
                    queue.append(argument[1])
                    argument = argument[0]
                elif len(argument) > 1:
                    raise _Unreadable
            if not _opens(argument, "{"):
                argument = _Group("{", "}", (argument,))
            bound.append(argument)
    return tuple(bound)


def _opens(item: str | _Group, delimiter: str) -> bool:
    return isinstance(item, _Group) and item.open == delimiter


def _flat(items: _Items) -> Iterator[str]:
    for item in items:
        if isinstance(item, _Group):
            yield item.open
            yield from _flat(item.items)
            yield item.close
        else:
            yield item


# --- From a tree to a form -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """An expression.

    Attributes:
        key: its tokens; equal keys are the same expression.
        number: its value if it is a plain number (an integer, decimal, fraction, mixed number).
        latex: LaTeX for the grammar, None if it holds something that is not allowed there.
        names: its variables.
        features: what it holds that not every expression does; see `_features`.
        unit: its unit, "" if there is none.
    """

    key: tuple[str, ...]
    number: Fraction | None
    latex: str | None
    names: frozenset[str]
    features: frozenset[str]
    unit: str = ""


@dataclass(frozen=True)
class _Text:
    words: str


@dataclass(frozen=True)
class _Based:
    digits: str
    base: int


@dataclass(frozen=True)
class _Ratio:
    """Sides of ``3:4``, or a time of day."""

    sides: tuple[_Value, ...]
    unit: str


@dataclass(frozen=True)
class _Bracketed:
    """Tuple, vector, or interval."""

    open: str
    close: str
    items: "tuple[_Form, ...]"


@dataclass(frozen=True)
class _Many:
    """Items without an order: kind "list" (also a set), or "union" of intervals and sets."""

    kind: str
    items: "tuple[_Form, ...]"


@dataclass(frozen=True)
class _Matrix:
    rows: "tuple[tuple[_Form, ...], ...]"


@dataclass(frozen=True)
class _Named:
    r"""``x = form``, ``f(x) = form``, ``x \in form``; an inequality for x is named, too."""

    name: str
    form: "_Form"


@dataclass(frozen=True)
class _Equation:
    """Sides of an equation or chain of equations that names nothing: ``x^2+y^2=1``, ``2+3=5``."""

    sides: "tuple[_Form, ...]"


@dataclass(frozen=True)
class _Inequality:
    r"""Sides in rising order; ``signs`` are "<" and "\le"."""

    signs: tuple[str, ...]
    sides: "tuple[_Form, ...]"


_Form: TypeAlias = (
    _Value
    | _Text
    | _Based
    | _Ratio
    | _Bracketed
    | _Many
    | _Matrix
    | _Named
    | _Equation
    | _Inequality
)

_SEPARATORS = frozenset([",", ";", "OR", "AND"])
_RELATIONS = frozenset(["=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx"])
_FLIPPED = {">": "<", "\\ge": "\\le"}


def _split(items: _Items, at: frozenset[str]) -> tuple[list[_Items], list[str]]:
    parts: list[_Items] = [()]
    marks: list[str] = []
    for item in items:
        if isinstance(item, str) and item in at:
            parts.append(())
            marks.append(item)
        else:
            parts[-1] += (item,)
    return parts, marks


@functools.lru_cache(maxsize=4096)
def _read(text: str, thousands: bool) -> _Form | None:
    """The text as a form, None if it is none."""
    try:
        return _list(_tree(text, thousands))
    except _Unreadable:
        return None


def _list(items: _Items) -> _Form:
    while items and items[-1] in (".", ",", ";"):
        items = items[:-1]
    parts, marks = _split(items, _SEPARATORS)
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
    return _Many("list", tuple(forms))


def _signs(items: _Items) -> list[_Items]:
    r"""The items with ``\pm`` as plus and as minus; ``\mp`` the other way round."""
    signs = [token for token in _flat(items) if token in ("\\pm", "\\mp")]
    if not signs:
        return [items]
    if len(signs) > 1:
        raise _Unreadable  # two or four values?
    return [_replaced(items, signs[0], sign) for sign in "+-"]


def _replaced(items: _Items, old: str, new: str) -> _Items:
    return tuple(
        item._replace(items=_replaced(item.items, old, new))
        if isinstance(item, _Group)
        else (new if item == old else item)
        for item in items
    )


def _union_of_named(forms: list[_Form]) -> _Form | None:
    r"""``x<1 \text{ or } x>3`` as a union of intervals."""
    names: set[str] = set()
    pieces: list[_Form] = []
    for form in forms:
        if not isinstance(form, _Named):
            return None
        names.add(form.name)
        pieces.append(form.form)
    if not any(isinstance(piece, _Bracketed) for piece in pieces):
        return None
    return _Named(names.pop(), _Many("union", tuple(pieces))) if len(names) == 1 else None


def _element(items: _Items) -> _Form:
    parts, signs = _split(items, _RELATIONS)
    if not signs:
        return _term(items)
    if "\\approx" in signs:
        return _approximation(items, parts, signs)
    if set(signs) == {"="}:
        return _equation(parts)
    if signs == ["\\in"]:
        if not (name := _name(parts[0])):
            raise _Unreadable
        return _Named(name, _term(parts[1]))
    if signs == ["\\ne"]:
        return _unequal(parts)
    return _inequality(parts, signs)


def _approximation(items: _Items, parts: list[_Items], signs: list[str]) -> _Form:
    """The exact value, where one is given; it must round to the other."""
    if signs.index("\\approx") != len(signs) - 1:
        raise _Unreadable
    if not parts[0]:
        return _term(parts[1])
    if len(parts) == 2 and (name := _name(parts[0])):
        return _Named(name, _term(parts[1]))
    exact, rounded = _element(items[: items.index("\\approx")]), _term(parts[-1])
    last = exact.form if isinstance(exact, _Named) else exact
    if isinstance(last, _Value) and isinstance(rounded, _Value) and last.number is not None:
        places = len(rounded.key[-1].partition(".")[2])
        error = abs(last.number - rounded.number) if rounded.number is not None else 1
        if error * 2 > Fraction(1, 10**places):
            raise _Unreadable
    return exact


def _equation(parts: list[_Items]) -> _Form:
    if len(parts) == 2 and not _name(parts[0]) and _name(parts[1]):
        parts = parts[::-1]
    names = []
    while len(parts) > 1:
        name = _name(parts[0])
        if not name or any(name in _flat(part) for part in parts[1:]):
            break
        names.append(name)
        parts = parts[1:]
    form = _term(parts[0]) if len(parts) == 1 else _Equation(tuple(_term(p) for p in parts))
    return _Named("=".join(names), form) if names else form


def _name(items: _Items) -> str:
    r"""A name such as ``x``, ``a_1``, ``f(x)``, ``AB``, ``(x,y)`` or a text; "" if it is none."""
    if not items:
        return ""
    first, rest = items[0], items[1:]
    if isinstance(first, _Group):
        parts, _ = _split(first.items, frozenset([","]))
        names = [_name(part) for part in parts]
        return ",".join(names) if first.open == "(" and not rest and all(names) else ""
    if first.startswith('"'):
        return first if not rest else ""
    if first in ("\\angle", "\\triangle") and rest:
        return first + inner if (inner := _name(rest)) else ""
    if not (first.isalpha() or first in _GREEK):
        return ""
    name = first
    while rest and isinstance(rest[0], str) and rest[0].isalpha() and rest[0].isupper():
        name, rest = name + rest[0], rest[1:]  # AB, a segment
    while len(rest) >= 2 and rest[0] == "_":
        name, rest = name + "_" + "".join(_flat(_argument(rest[1]))), rest[2:]
    if rest and isinstance(rest[0], _Group) and rest[0].open == "(":
        name, rest = name + "(" + "".join(_flat(rest[0].items)) + ")", rest[1:]
    return name if not rest else ""


def _argument(item: str | _Group) -> _Items:
    """Items of an argument, which `_bound` has put in braces."""
    return item.items if isinstance(item, _Group) and item.open == "{" else (item,)


_INFINITY: _Items = ("\\infty",)


def _interval(low: _Items, left: str, high: _Items, right: str) -> _Bracketed:
    return _Bracketed(left, right, (_term(low), _term(high)))


def _unequal(parts: list[_Items]) -> _Form:
    name = _name(parts[0])
    if not name:
        raise _Unreadable
    below = _interval(("-", *_INFINITY), "(", parts[1], ")")
    above = _interval(parts[1], "(", _INFINITY, ")")
    return _Named(name, _Many("union", (below, above)))


def _inequality(parts: list[_Items], signs: list[str]) -> _Form:
    if all(sign in _FLIPPED for sign in signs):
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if not all(sign in _FLIPPED.values() for sign in signs):
        raise _Unreadable
    brackets = {"<": "()", "\\le": "[]"}
    names = [_name(part) for part in parts]
    if len(parts) == 3 and names[1]:
        left, right = brackets[signs[0]][0], brackets[signs[1]][1]
        return _Named(names[1], _interval(parts[0], left, parts[2], right))
    if len(parts) == 2 and names[0] and not names[1]:
        right = brackets[signs[0]][1]
        return _Named(names[0], _interval(("-", *_INFINITY), "(", parts[1], right))
    if len(parts) == 2 and names[1] and not names[0]:
        left = brackets[signs[0]][0]
        return _Named(names[1], _interval(parts[0], left, _INFINITY, ")"))
    return _Inequality(tuple(signs), tuple(_term(part) for part in parts))


def _term(items: _Items) -> _Form:
    if not items:
        raise _Unreadable
    if "\\cup" in items:
        parts, _ = _split(items, frozenset(["\\cup"]))
        return _Many("union", tuple(_term(part) for part in parts))
    if len(items) == 1 and isinstance(items[0], _Group):
        return _group(items[0])
    if all(isinstance(item, str) and item.startswith('"') for item in items):
        return _Text(_words(" ".join(str(item)[1:] for item in items)))
    items, unit = _without_unit(items)
    if len(items) == 1 and isinstance(items[0], _Group) and not unit:
        return _group(items[0])
    if ":" in items:
        parts, _ = _split(items, frozenset([":"]))
        return _Ratio(tuple(_value(part) for part in parts), unit)
    based = _based(items)
    if based is not None and not unit:
        return based
    return _value(items, unit)


def _words(text: str) -> str:
    words = re.findall(r"\w+|[^\w\s.,;:?'\"]", text)
    if not words:
        raise _Unreadable
    return " ".join(words[1:] if words[0] in ("a", "an", "the") and len(words) > 1 else words)


def _group(group: _Group) -> _Form:
    if group.open.startswith("\\begin"):
        rows, _ = _split(group.items, frozenset(["\\\\"]))
        cells = [_split(row, frozenset(["&"]))[0] for row in rows if row]
        return _Matrix(tuple(tuple(_term(cell) for cell in row) for row in cells))
    if group.open == "\\{":
        inner = _list(group.items) if group.items else _Many("list", ())
        return inner if isinstance(inner, _Many) else _Many("list", (inner,))
    if group.open in "([":
        parts, marks = _split(group.items, frozenset([",", ";"]))
        if marks:
            return _Bracketed(group.open, group.close, tuple(_term(part) for part in parts))
        if group.open + group.close == "()":
            only = group.items[0] if len(group.items) == 1 else ""
            if isinstance(only, _Group) and only.open.startswith("\\begin"):
                return _group(only)
            return _term(group.items)
        if len(group.items) == 1 and isinstance(group.items[0], _Group):
            return _group(group.items[0])  # [\begin{array}...]
    return _value((group,))


def _based(items: _Items) -> _Based | None:
    r"""``43_5``, ``2A_{12}``, ``-1_{2}``."""
    sign = items[0] == "-"
    body = items[1:] if sign else items
    if len(body) < 3 or body[-2] != "_":
        return None
    base = "".join(_flat(_argument(body[-1])))
    digits = "".join(item if isinstance(item, str) else "?" for item in body[:-2])
    if not (_INTEGER.fullmatch(base) and re.fullmatch(r"[0-9A-Z.]*[0-9][0-9A-Z.]*", digits)):
        return None
    return _Based("-" * sign + digits, int(base))


_UNIT_WORDS = _table(
    "centimeter centimetre: cm, millimeter: mm, kilometer kilometre: km, meter metre: m,"
    " feet ft: foot, inche in: inch, mi: mile, minute: min, second: sec, hr: hour, kilogram: kg,"
    " sq: square, usd: dollar, percent: %, deg: degree"
)
_SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# A number with one of these beside it is another number, or two, or none.
_NOT_A_UNIT = _set(
    "or and not no non if but either neither nor minus plus times negative positive over under by"
    " half third quarter squared cubed factorial root less more below above most least than about"
    " approximately roughly around between to is are equals except modulo mod base"
)


def _without_unit(items: _Items) -> tuple[_Items, str]:
    """The items without their unit, and the unit in one spelling."""
    unit: list[str] = []
    while items and items[0] == "\\$":
        items, unit = items[1:], ["dollar"]
    if len(items) > 1 and items[0] in ("+", "-") and items[1] == "\\$":
        items, unit = (items[0], *items[2:]), ["dollar"]
    angle = "trigonometric" in _features(tuple(_flat(items)))  # \sin 30^\circ has no unit
    found = True
    while found and items:
        found = False
        last = items[-1]
        power = ""
        rest = items[:-1]
        if len(items) >= 3 and items[-2] == "^":
            power = "".join(_flat(_argument(last)))
            if power == "\\circ" and not angle:
                items, unit, found = items[:-2], ["degree", *unit], True
                continue
            if power.startswith('"') and power[1:] in ("th", "st", "nd", "rd"):
                items, found = items[:-2], True
                continue
            last, rest = items[-3], items[:-3]
        if last == "%" and not power:
            items, unit, found = rest, ["%", *unit], True
        elif isinstance(last, str) and last.startswith('"') and rest:
            words = _unit(last[1:] + power)
            items, unit, found = rest, [*words, *unit], True
    if not items:
        raise _Unreadable
    return items, " ".join(unit)


def _unit(text: str) -> list[str]:
    words = []
    powers = {"square": "2", "cubic": "3"}
    power = ""
    for word in re.findall(r"[a-z]+|[0-9]+|%", text):
        if word in _NOT_A_UNIT:
            raise _Unreadable
        if word in ("th", "st", "nd", "rd", "per", "a"):
            continue
        if len(word) > 2 and word.endswith("s"):
            word = word[:-1]
        word = _UNIT_WORDS.get(word, word)
        if word in powers:
            power = powers[word]
        else:
            words.append(word)
    return [*words, power] if power else words


# --- Expressions ---------------------------------------------------------------------------------

_GREEK = _set(
    r"\alpha \beta \gamma \theta \lambda \mu \omega \phi \rho \sigma \tau \epsilon \delta"
    r" \varphi \psi \eta \kappa \nu \xi \Delta \Omega \Sigma \Phi"
)
_INTEGER = re.compile(r"[0-9]+")


def _value(items: _Items, unit: str = "") -> _Value:
    if not items:
        raise _Unreadable
    while items[0] == "+" and len(items) > 1:
        items = items[1:]
    tokens = tuple(_flat(items))
    if any(token.startswith('"') for token in tokens):
        raise _Unreadable
    number = _number(items)
    scale, _, rest = unit.partition(" ")
    if scale in _SCALES:
        if number is None:
            raise _Unreadable
        return _Value(
            (*tokens, unit), number * _SCALES[scale], None, frozenset(), frozenset(), rest
        )
    try:
        latex = _Writer("trigonometric" in _features(tokens)).write(items)
    except _Unreadable:
        latex = None
    names = frozenset(token for token in tokens if token.isalpha() or token in _GREEK) - {"e", "i"}
    return _Value(tokens, number, latex, names, _features(tokens), unit)


def _features(tokens: tuple[str, ...]) -> frozenset[str]:
    found = {_FUNCTIONS[token[1:]] for token in tokens if token[1:] in _FUNCTIONS}
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


def _number(items: _Items) -> Fraction | None:
    """Value of a plain number, None if it is not one."""
    if items and items[0] in ("-", "+"):
        value = _number(items[1:]) if items[1:2] not in (("-",), ("+",)) else None
        return None if value is None else (-value if items[0] == "-" else value)
    match items:
        case (_Group(open="(", items=inner),):
            return _number(inner)
        case (str(digits),) if _is_digits(digits):
            return Fraction(digits)
        case ("\\frac", upper, lower):
            return _quotient(_number(_argument(upper)), _number(_argument(lower)))
        case (str(upper), "/", str(lower)) if _is_digits(upper) and _is_digits(lower):
            return _quotient(Fraction(upper), Fraction(lower))
        case (str(whole), "\\frac", upper, lower) if _INTEGER.fullmatch(whole):
            return _mixed(whole, _argument(upper), _argument(lower))
        case (str(whole), str(upper), "/", str(lower)) if _INTEGER.fullmatch(whole):
            return _mixed(whole, (upper,), (lower,))
        case (str(head), "\\bar", tail) if _is_digits(head) and "." in head:
            return _repeating(head, "".join(_flat(_argument(tail))))
        case (str(base), "^", exponent) if _INTEGER.fullmatch(base):
            return _power(Fraction(base), _number(_argument(exponent)))
        case (str(factor), "*", "10", "^", exponent) if _is_digits(factor):
            power = _power(Fraction(10), _number(_argument(exponent)))
            return None if power is None else Fraction(factor) * power
    return None


def _is_digits(token: str) -> bool:
    return token[0] in "0123456789." and token != "."


def _quotient(upper: Fraction | None, lower: Fraction | None) -> Fraction | None:
    return None if upper is None or not lower else upper / lower


def _power(base: Fraction, exponent: Fraction | None) -> Fraction | None:
    if exponent is None or exponent.denominator != 1 or (not base and exponent <= 0):
        return None
    bits = abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if bits <= _MAX_BITS else None


def _mixed(whole: str, upper: _Items, lower: _Items) -> Fraction | None:
    texts = ["".join(_flat(part)) for part in (upper, lower)]
    if not all(_INTEGER.fullmatch(text) for text in texts):
        return None
    top, bottom = map(int, texts)
    return int(whole) + Fraction(top, bottom) if 0 < top < bottom else None


def _repeating(head: str, period: str) -> Fraction | None:
    if not _INTEGER.fullmatch(period):
        return None
    places = len(head.partition(".")[2])
    return Fraction(head) + Fraction(int(period), (10 ** len(period) - 1) * 10**places)


class _Writer:
    """Writes an expression out for the grammar: each factor, argument and product explicit.

    Raises `_Unreadable` for everything that is not on its list.
    """

    def __init__(self, degrees: bool) -> None:
        self._degrees = degrees

    def write(self, items: _Items) -> str:
        """LaTeX of a sum."""
        out: list[str] = []
        i = 0
        after = "operator"  # or "factor", "quotient": a factor that a slash came before
        while i < len(items):
            item = items[i]
            if item in ("+", "-"):
                if after == "operator" and out and out[-1] in "+-":
                    raise _Unreadable
                out.append(str(item))
                after, i = "operator", i + 1
            elif item in ("*", "/"):
                if after == "operator":
                    raise _Unreadable
                out.append("\\cdot " if item == "*" else "/")
                after, i = ("operator" if item == "*" else "slash"), i + 1
            else:
                if after == "quotient":
                    raise _Unreadable  # 1/2x
                if after == "factor":
                    out.append("\\cdot ")
                text, i = self._factor(items, i)
                out.append(text)
                after = "quotient" if after == "slash" else "factor"
        if after in ("operator", "slash"):
            raise _Unreadable
        return "".join(out)

    def _factor(self, items: _Items, i: int) -> tuple[str, int]:
        """LaTeX of the factor that starts at i, with its exponent, and where it ends."""
        start = i
        text, i = self._base(items, i)
        while i < len(items) and items[i] in ("^", "!"):
            if items[i] == "!":
                self._check_factorial(items[start:i])
                text, i = f"{text}!", i + 1
                continue
            if i + 1 >= len(items):
                raise _Unreadable
            exponent = _argument(items[i + 1])
            if exponent == ("\\circ",):
                if not self._degrees:
                    raise _Unreadable
                text = rf"({text}\cdot \frac{{\pi}}{{180}})"
            else:
                text = f"{text}^{{{self._exponent(exponent)}}}"
            i += 2
            if i < len(items) and items[i] == "^":
                raise _Unreadable
        return text, i

    def _base(self, items: _Items, i: int) -> tuple[str, int]:
        item = items[i]
        if isinstance(item, _Group):
            return self._delimited(item), i + 1
        if _is_digits(item):
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
            if isinstance(index, _Group) and index.open + index.close == "[]":
                (radicand,) = self._arguments(items, i + 1, 1)
                return rf"\sqrt[{self._exponent(index.items)}]{{{self.write(radicand)}}}", i + 3
            (radicand,) = self._arguments(items, i, 1)
            return rf"\sqrt{{{self.write(radicand)}}}", i + 2
        if item[1:] in _FUNCTIONS and item.startswith("\\"):
            return self._function(items, i)
        if item == "\\pi":
            return "\\pi ", i + 1
        if item.isalpha() or item in _GREEK:
            return self._symbol(items, i)
        raise _Unreadable

    def _digits(self, items: _Items, i: int) -> tuple[str, int]:
        digits = str(items[i])
        following = items[i + 1 : i + 4]
        if following[:1] == ("\\frac",) and _INTEGER.fullmatch(digits):
            fraction = _number(following)
            if fraction is not None:
                mixed = _number((digits, *following))
                if mixed is None:
                    raise _Unreadable  # 2\frac{3}{2}: a product?
                return _fraction_latex(mixed), i + 4
        if following and isinstance(following[0], str) and _is_digits(following[0]):
            raise _Unreadable  # 2 3
        return _fraction_latex(Fraction(digits)), i + 1

    def _symbol(self, items: _Items, i: int) -> tuple[str, int]:
        name = str(items[i])
        after = items[i + 1] if i + 1 < len(items) else ""
        if isinstance(after, _Group) and after.open == "(" and name in "fghFGHPQ":
            raise _Unreadable  # a function, not a product
        name = {"d": "\\zeta "}.get(name, name + " ")  # the grammar takes dx for a differential
        if after != "_":
            return name, i + 1
        if i + 2 >= len(items):
            raise _Unreadable
        index = "".join(_flat(_argument(items[i + 2])))
        if not index.isalnum():
            raise _Unreadable
        return f"{name.strip()}_{{{index}}}", i + 3

    def _function(self, items: _Items, i: int) -> tuple[str, int]:
        name = str(items[i])
        i += 1
        for mark in ("_", "^", "_"):
            if items[i : i + 1] == (mark,) and i + 1 < len(items):
                name += f"{mark}{{{self._exponent(_argument(items[i + 1]))}}}"
                i += 2
        if i >= len(items):
            raise _Unreadable
        first = items[i]
        if isinstance(first, _Group) and first.open == "(":
            return f"{name}({self.write(first.items)})", i + 1
        end = i  # \sin 2x: all factors up to an operator or the next function
        while end < len(items):
            item = items[end]
            if item in ("+", "-", "*", "/") and end > i:
                break
            if isinstance(item, str) and item[1:] in _FUNCTIONS and item.startswith("\\"):
                break
            if isinstance(item, _Group) and item.open == "(":
                raise _Unreadable  # \sin x(x+1)
            end += 1
        return f"{name}({self.write(items[i:end])})", end

    def _delimited(self, group: _Group) -> str:
        inner = self.write(group.items)
        if group.open in ("\\lfloor", "\\lceil"):
            return f"{group.open} {inner}{group.close} "
        if group.open == "|":
            return f"|{inner}|"
        if group.open + group.close in ("()", "[]"):
            return f"({inner})"
        raise _Unreadable

    def _arguments(self, items: _Items, i: int, count: int) -> list[_Items]:
        arguments = items[i + 1 : i + 1 + count]
        if len(arguments) < count:
            raise _Unreadable
        return [_argument(argument) for argument in arguments]

    def _exponent(self, items: _Items) -> str:
        tokens = list(_flat(items))
        if "!" in tokens or any(
            _is_digits(token) and Fraction(token) > _MAX_EXPONENT for token in tokens
        ):
            raise _Unreadable
        if "^" in tokens and not any(token.isalpha() or token in _GREEK for token in tokens):
            raise _Unreadable  # a tower
        return self.write(items)

    def _check_factorial(self, items: _Items) -> None:
        for token in _flat(items):
            if token in ("^", "!", "\\frac", "*", "\\binom") or (
                _is_digits(token) and Fraction(token) > _MAX_FACTORIAL
            ):
                raise _Unreadable


def _fraction_latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


# --- Matching ------------------------------------------------------------------------------------

_Mode: TypeAlias = Literal["answer", "value", "up to a factor"]
_Same: TypeAlias = Callable[[_Value, _Value, _Mode], bool]


def _match(gold: _Form, answer: _Form, same: _Same) -> bool:
    """Whether the forms are equal, given when two expressions are."""
    if gold == answer:
        return True
    if isinstance(gold, _Named) or isinstance(answer, _Named):
        if isinstance(gold, _Named) and isinstance(answer, _Named) and gold.name != answer.name:
            return False
        return _match(_unnamed(gold), _unnamed(answer), same)
    if isinstance(answer, _Equation):
        if isinstance(gold, _Equation):
            return _match_equations(gold, answer, same)
        return _match(gold, answer.sides[-1], same) and all(
            _match(gold, side, lambda g, a, _: same(g, a, "value")) for side in answer.sides[:-1]
        )
    if isinstance(gold, _Equation):  # 0.56 = 56\%
        return _is_chain(gold) and all(_match(side, answer, same) for side in gold.sides)
    gold, answer = _single(gold), _single(answer)
    match gold, answer:
        case _Value(), _Value():
            return _units_agree(gold.unit, answer.unit) and same(gold, answer, "answer")
        case (_Text() as text, _Value() as value) | (_Value() as value, _Text() as text):
            return text.words == "".join(value.key).lower()  # \text{odd}; three bare letters
        case _Ratio(), _Ratio():
            return _units_agree(gold.unit, answer.unit) and _all(gold.sides, answer.sides, same)
        case _Ratio(), _Value():
            return _match_ratio(gold, answer)
        case _Value(), _Ratio():
            return _match_ratio(answer, gold)
        case _Bracketed(), _Bracketed():
            brackets = gold.open + gold.close == answer.open + answer.close
            return brackets and _all(gold.items, answer.items, same)
        case _Many(), _Many():
            return gold.kind == answer.kind and _match_unordered(gold.items, answer.items, same)
        case _Matrix(), _Matrix():
            if len(gold.rows) != len(answer.rows):
                return False
            return all(_all(g, a, same) for g, a in zip(gold.rows, answer.rows, strict=True))
        case _Inequality(), _Inequality():
            return gold.signs == answer.signs and _all(gold.sides, answer.sides, same)
    return False


def _unnamed(form: _Form) -> _Form:
    return form.form if isinstance(form, _Named) else form


def _single(form: _Form) -> _Form:
    """The item of a list of one."""
    return form.items[0] if isinstance(form, _Many) and len(form.items) == 1 else form


def _all(gold: Sequence[_Form], answer: Sequence[_Form], same: _Same) -> bool:
    return len(gold) == len(answer) and all(
        _match(g, a, same) for g, a in zip(gold, answer, strict=True)
    )


def _match_unordered(gold: Sequence[_Form], answer: Sequence[_Form], same: _Same) -> bool:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        found = next((i for i, other in enumerate(left) if _match(item, other, same)), None)
        if found is None:
            return False
        del left[found]
    return True


def _is_chain(equation: _Equation) -> bool:
    return all(isinstance(side, _Value) and not side.names for side in equation.sides)


def _match_equations(gold: _Equation, answer: _Equation, same: _Same) -> bool:
    if len(gold.sides) != 2 or len(answer.sides) != 2:
        return False
    if _all(gold.sides, answer.sides, same) or _all(gold.sides, answer.sides[::-1], same):
        return True
    left, right = _difference(gold), _difference(answer)
    return left is not None and right is not None and same(left, right, "up to a factor")


def _difference(equation: _Equation) -> _Value | None:
    """Left side less right side."""
    left, right = equation.sides
    if not (isinstance(left, _Value) and isinstance(right, _Value) and left.latex and right.latex):
        return None
    latex = f"{left.latex}-({right.latex})"
    names = left.names | right.names
    if left.unit or right.unit or not names:
        return None
    return _Value((latex,), None, latex, names, left.features | right.features)


def _units_agree(gold: str, answer: str) -> bool:
    clock = {"am", "pm"}
    if gold in clock or answer in clock:
        return gold == answer
    return not gold or not answer or gold == answer


def _match_ratio(ratio: _Ratio, value: _Value) -> bool:
    if len(ratio.sides) != 2 or ratio.unit:
        return False
    first, second = (side.number for side in ratio.sides)
    return value.number is not None and value.number == _quotient(first, second)


def _same_at_sight(gold: _Value, answer: _Value, mode: _Mode) -> bool | None:
    """Whether two expressions are equal, None if that takes the grammar."""
    if gold.key == answer.key and "%" not in (gold.unit, answer.unit):
        return True
    if gold.number is not None and answer.number is not None:
        return _same_number(gold, answer)
    if gold.latex is None or answer.latex is None or gold.names != answer.names:
        return False
    if mode != "value" and (gold.number is not None or not answer.features <= gold.features):
        return False
    return None


def _same_number(gold: _Value, answer: _Value) -> bool:
    """50% is 50, where the question asks for percent, and 1/2; 0.5 is no percentage."""
    assert gold.number is not None and answer.number is not None
    if gold.unit == answer.unit:
        return gold.number == answer.number
    if gold.unit == "%" and gold.number == 100 * answer.number:
        return True
    if answer.unit == "%" and (100 * gold.number == answer.number or abs(gold.number) <= 1):
        return 100 * gold.number == answer.number
    return gold.number == answer.number


def _same_or_undecided(gold: _Value, answer: _Value, mode: _Mode) -> bool:
    same = _same_at_sight(gold, answer, mode)
    if same is None:
        raise _Undecided
    return same


def _same_by_grammar(gold: _Value, answer: _Value, mode: _Mode) -> bool:
    same = _same_at_sight(gold, answer, mode)
    if same is None:
        assert gold.latex is not None and answer.latex is not None
        return _agree(gold.latex, answer.latex, "i" not in gold.key, mode)
    return same


def _equal(gold: str, answer: str, same: _Same) -> bool:
    """Whether two answers are equal."""
    for thousands in (True, False):
        forms = _read(gold, thousands), _read(answer, thousands)
        if forms[0] is not None and forms[1] is not None and _match(forms[0], forms[1], same):
            return True
    return False


def _equal_in_worker(gold: str, answer: str) -> bool:
    """What the workers run. May take forever."""
    return _equal(gold, answer, _same_by_grammar)


def _decide(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal, None if a worker is to say."""
    gold, answer = gold.strip(), answer.strip()
    if not gold or len(gold) > _MAX_CHARS or len(answer) > _MAX_CHARS:
        return bool(gold) and gold == answer
    if gold == answer:
        return True
    try:
        return _equal(gold, answer, _same_or_undecided)
    except _Undecided:
        return None


# --- In a worker: expressions by value -----------------------------------------------------------

_DIGITS = 150
_AGREEMENT = 120
_POINTS = 4
_MAX_MAGNITUDE = 10**6  # natural logarithm of the largest value


@functools.lru_cache(maxsize=2048)
def _parsed(latex: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import (  # type: ignore[import-untyped]
        ConversionConfig,
        latex2sympy,
    )

    config = ConversionConfig(lowercase_symbols=False)
    try:
        return latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=config)
    except MemoryError:
        raise
    except Exception:
        return None


def _agree(gold: str, answer: str, real: bool, mode: _Mode) -> bool:
    """Whether two expressions have the same value at all points, or a constant quotient.

    At points of either sign, and if `real`, neither may have a real value where the other has none:
    sqrt(x^2) is not x.
    """
    import mpmath  # type: ignore[import-untyped]

    with mpmath.workdps(_DIGITS):
        quotient = None
        for point in range(2 * _POINTS):
            left, right = (_value_at(_parsed(latex), point) for latex in (gold, answer))
            if point >= _POINTS and real:
                if not _is_real(left) and not _is_real(right):
                    continue
                if not _is_real(left) or not _is_real(right):
                    return False
            if left is None or right is None:
                return False
            if mode == "up to a factor":
                if not left or not right:
                    return False
                left, right = left / right, quotient or left / right
                quotient = right
            if not _close(left, right):
                return False
    return True


def _is_real(value: Any) -> bool:
    if value is None or isinstance(value, Fraction):
        return value is not None
    return bool(abs(value.imag) <= abs(value) * _tolerance())


def _close(left: Any, right: Any) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = _approximate(left), _approximate(right)
    size = max(abs(left), abs(right))
    return bool(abs(left - right) <= size * _tolerance())


def _tolerance() -> Any:
    import mpmath

    return mpmath.mpf(10) ** -_AGREEMENT


class _NoValue(Exception):
    """An expression without a value: undefined, or of a kind that is not evaluated."""


def _value_at(expression: Any, point: int) -> Any:
    """Value where each variable has a number of its own; None if it has none, or is None.

    An exact Fraction if nothing but arithmetic led to it, else a number of mpmath.
    """
    try:
        value = _evaluate(expression, point)
    except (_NoValue, ArithmeticError, AttributeError, ValueError, TypeError):
        return None
    return value if isinstance(value, Fraction) or value == value else None  # not NaN


def _coordinate(name: str, point: int) -> Fraction:
    """Positive at the first points, of either sign at the others."""
    value = Fraction(random.Random(f"{name} {point}").randrange(1, 30_000), 10_007)
    return value if point < _POINTS else value - Fraction(3, 2)


def _approximate(value: Any) -> Any:
    import mpmath

    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _evaluate(expression: Any, point: int) -> Any:
    import mpmath
    import sympy  # type: ignore[import-untyped]

    if expression.is_Rational:
        return Fraction(expression.p, expression.q)
    if expression.is_Symbol:
        return mpmath.mpc(0, 1) if expression.name == "i" else _coordinate(expression.name, point)
    if expression is sympy.pi:
        return +mpmath.pi
    if expression is sympy.E:
        return +mpmath.e
    parts = [_evaluate(part, point) for part in expression.args]
    exact = all(isinstance(part, Fraction) for part in parts)
    if isinstance(expression, sympy.exp):
        parts = [+mpmath.e, *parts]
    elif expression.is_Pow and exact:
        power = _power(*parts)
        if power is not None:
            return power
    elif expression.is_Add and exact:
        return sum(parts)
    elif expression.is_Mul and exact:
        return math.prod(parts)
    parts = [_approximate(part) for part in parts]
    if expression.is_Add:
        return mpmath.fsum(parts)
    if expression.is_Mul:
        return mpmath.fprod(parts)
    if expression.is_Pow or isinstance(expression, sympy.exp):
        base, exponent = parts
        if base and abs(exponent * mpmath.log(abs(base))) > _MAX_MAGNITUDE:
            raise _NoValue
        return mpmath.power(base, exponent)
    function = {
        sympy.log: mpmath.log,
        sympy.sin: mpmath.sin,
        sympy.cos: mpmath.cos,
        sympy.tan: mpmath.tan,
        sympy.cot: mpmath.cot,
        sympy.sec: mpmath.sec,
        sympy.csc: mpmath.csc,
        sympy.asin: mpmath.asin,
        sympy.acos: mpmath.acos,
        sympy.atan: mpmath.atan,
        sympy.sinh: mpmath.sinh,
        sympy.cosh: mpmath.cosh,
        sympy.tanh: mpmath.tanh,
        sympy.coth: mpmath.coth,
        sympy.Abs: abs,
        sympy.floor: mpmath.floor,
        sympy.ceiling: mpmath.ceil,
        sympy.factorial: mpmath.factorial,
        sympy.binomial: mpmath.binomial,
        sympy.UnevaluatedExpr: lambda value: value,
    }.get(expression.func)
    if function is None:
        raise _NoValue  # a sum, an integral, a derivative, an unknown function
    return function(*parts)


# --- Public --------------------------------------------------------------------------------------


class MathScorer:
    r"""Scores MATH responses with worker processes of its own.

    Most answers need none: the same text, a plain number, a form that differs. A worker that takes
    longer than the time-out, crashes or outgrows its memory is killed and replaced; the answer
    scores 0 and is counted, and nothing is raised. Scores are remembered by answer and gold. Not
    for use by two threads at once; after a fork, and after unpickling, it starts anew.

    Args:
        workers: number of processes; started when first needed.
        timeout: seconds for one answer.
        memory_gib: address space of a worker, in GiB.
        max_jobs: answers after which a worker is replaced.
        cache_size: number of (answer, gold) pairs to remember.

    Raises:
        ValueError: for an option out of range.
        ImportError: if math-verify is not installed.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout: float = 3.0,
        memory_gib: float = 2.0,
        max_jobs: int = 2000,
        cache_size: int = 20_000,
    ) -> None:
        if not isinstance(cache_size, int) or cache_size < 0:
            raise ValueError(f"cache_size={cache_size!r}; pass an int of at least 0")
        if importlib.util.find_spec("latex2sympy2_extended") is None:
            raise ImportError("the MATH scorer needs math-verify; pip install 'math-verify>=0.9'")
        self._pool = WorkerPool(
            f"{__name__}:{_equal_in_worker.__name__}",
            workers=workers,
            timeout=timeout,
            memory_gib=memory_gib,
            max_jobs=max_jobs,
            warm_up=_WARM_UP,
        )
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._timeouts = 0

    def __enter__(self) -> "MathScorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.pids

    def start(self) -> None:
        """Start the workers now, rather than at the first answer that needs one.

        Raises:
            RuntimeError: if they do not come up, with the reason.
        """
        self._pool.start()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def timeouts(self) -> int:
        """Answers that were given up since this was last asked."""
        count, self._timeouts = self._timeouts, 0
        return count

    def score(self, responses: Sequence[str], golds: Sequence[str]) -> list[float]:
        r"""Score each response against its gold: 1.0 if equal, else 0.0.

        Args:
            responses: the generated texts; any string is safe.
            golds: the right answers, without ``oxed``; an empty one scores 0.0.

        Raises:
            ValueError: for something other than as many strings each.
            RuntimeError: if no worker comes up, with the reason.
        """
        _check(responses, golds)
        answers = [last_boxed(response) for response in responses]
        scores = [0.0] * len(answers)
        undecided: dict[tuple[str, str], list[int]] = {}
        for i, (answer, gold) in enumerate(zip(answers, golds, strict=True)):
            if answer is None:
                continue
            pair = gold.strip(), answer.strip()
            score = self._cache.get(pair)
            if score is None:
                equal = _decide(*pair)
                if equal is None:
                    undecided.setdefault(pair, []).append(i)
                    continue
                score = float(equal)
                self._remember(pair, score)
            else:
                self._cache.move_to_end(pair)
            scores[i] = score
        results = self._pool.map(list(undecided)) if undecided else []
        for (pair, places), result in zip(undecided.items(), results, strict=True):
            if result is None:
                self._timeouts += len(places)
                continue
            self._remember(pair, float(result))
            for i in places:
                scores[i] = float(result)
        return scores

    def _remember(self, pair: tuple[str, str], score: float) -> None:
        if len(pair[1]) <= _MAX_CHARS:
            self._cache[pair] = score
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)


_WARM_UP = (r"\frac{x^2-1}{2}+\sqrt{3}", r"\sqrt{3}+(x-1)\cdot\frac{x+1}{2}")


def _check(responses: object, golds: object) -> None:
    for name, texts in [("responses", responses), ("golds", golds)]:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"{name}={texts!r:.100} is no list of strings")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{name} holds {text!r:.100}, which is not a string")
    assert isinstance(responses, Sequence) and isinstance(golds, Sequence)
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} golds; pass one gold each")


_shared_scorer: MathScorer | None = None


def score_math_batch(responses: Sequence[str], golds: Sequence[str]) -> tuple[list[float], int]:
    r"""Score responses with the workers that this process shares.

    Args:
        responses: the generated texts; any string is safe, and none raises.
        golds: the right answers, without ``\boxed``; an empty one scores 0.0.

    Returns:
        The scores, each 0.0 or 1.0, and how many answers were given up for lack of time.

    Raises:
        ValueError: for something other than as many strings each.
    """
    global _shared_scorer
    if _shared_scorer is None:
        _shared_scorer = MathScorer()
    scores = _shared_scorer.score(responses, golds)
    return scores, _shared_scorer.timeouts()


def score_math(response: str, gold: str) -> float:
    r"""Score one response: 1.0 if its last closed ``\boxed`` equals the gold, else 0.0.

    Raises:
        ValueError: if an argument is not a string.
    """
    scores, _ = score_math_batch([response], [gold])
    return scores[0]
