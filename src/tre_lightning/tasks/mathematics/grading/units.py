"""The unit of an answer, in one spelling."""

import re

from tre_lightning.tasks.mathematics.grading.expressions import features_of
from tre_lightning.tasks.mathematics.grading.tree import Items, Unreadable, argument_items, flat
from tre_lightning.tasks.mathematics.grading.vocabulary import NOT_A_UNIT, UNIT_WORDS


def without_unit(items: Items) -> tuple[Items, str]:
    """The items without their unit, and the unit in one spelling.

    Raises:
        Unreadable: for nothing but a unit, and for words that are none.
    """
    unit: list[str] = []
    while items and items[0] == "\\$":
        items, unit = items[1:], ["dollar"]
    if len(items) > 1 and items[0] in ("+", "-") and items[1] == "\\$":
        items, unit = (items[0], *items[2:]), ["dollar"]
    angle = "trigonometric" in features_of(tuple(flat(items)))  # \sin 30^\circ has no unit
    found = True
    while found and items:
        found = False
        last = items[-1]
        power = ""
        rest = items[:-1]
        if len(items) >= 3 and items[-2] == "^":
            power = "".join(flat(argument_items(last)))
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
        raise Unreadable
    return items, " ".join(unit)


def _unit(text: str) -> list[str]:
    words = []
    powers = {"square": "2", "cubic": "3"}
    power = ""
    for word in re.findall(r"[a-z]+|[0-9]+|%", text):
        if word in NOT_A_UNIT:
            raise Unreadable
        if word in ("th", "st", "nd", "rd", "per", "a"):
            continue
        if len(word) > 2 and word.endswith("s"):
            word = word[:-1]
        word = UNIT_WORDS.get(word, word)
        if word in powers:
            power = powers[word]
        else:
            words.append(word)
    return [*words, power] if power else words
