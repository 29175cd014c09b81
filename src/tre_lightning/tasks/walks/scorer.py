"""Exact scorer of number walks: ``#2 5 + 7 = 12 #1 12 - 3 = 9``, two steps of 3 or 7 from 5."""

from collections.abc import Collection

WORDS_A_STEP = 6


def score_walk(response: str, start: int, sizes: Collection[int], steps: int) -> float:
    """1.0 for a correct walk, else 0.0, in linear time for any response.

    A right walk has exactly ``steps`` steps of six words: the count of the steps left, the number
    reached, ``+`` or ``-``, one of ``sizes``, ``=``, and their sound result. The first begins at
    ``start``, each other one where the last has ended.

    Args:
        response: hostile text; it is split at white space and compared, never evaluated.
        start: where the walk begins.
        sizes: what a step may add or take away.
        steps: how many steps it has to have, at least 1.
    """
    words = response.split()
    if len(words) != WORDS_A_STEP * steps:
        return 0.0
    allowed = {str(size): size for size in sizes}
    reached = start
    for step in range(steps):
        first = WORDS_A_STEP * step
        label, left, sign, size, equals, result = words[first : first + WORDS_A_STEP]
        if label != f"#{steps - step}" or left != str(reached) or equals != "=":
            return 0.0
        if sign not in ("+", "-") or size not in allowed:
            return 0.0
        reached += allowed[size] if sign == "+" else -allowed[size]
        if result != str(reached):
            return 0.0
    return 1.0
