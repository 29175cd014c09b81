"""Exact scorer of number walks: ``#2 5 + 9 = 14 #1 14 + 3 = 17`` goes from 5 to 17 in two."""

WORDS_A_STEP = 6


def score_walk(response: str, start: int, target: int, steps: int, largest_step: int = 9) -> float:
    """1.0 for a right walk, else 0.0, in linear time whatever the response holds.

    A right walk has exactly ``steps`` steps of six words: the count of the steps left, the number
    reached, ``+`` or ``-``, 1 to ``largest_step``, ``=``, and their sound result. The first begins
    at ``start``, each other one where the last has ended, and the last ends at ``target``.

    Args:
        response: hostile text; it is split at white space and compared, never evaluated.
        start: where the walk begins.
        target: where it has to end.
        steps: how many steps it has to have, at least 1.
        largest_step: most that one step may add or take away.
    """
    words = response.split()
    if len(words) != WORDS_A_STEP * steps:
        return 0.0
    sizes = {str(size): size for size in range(1, largest_step + 1)}
    reached = start
    for step in range(steps):
        first = WORDS_A_STEP * step
        label, left, sign, size, equals, result = words[first : first + WORDS_A_STEP]
        if label != f"#{steps - step}" or left != str(reached) or equals != "=":
            return 0.0
        if sign not in ("+", "-") or size not in sizes:
            return 0.0
        reached += sizes[size] if sign == "+" else -sizes[size]
        if result != str(reached):
            return 0.0
    return float(reached == target)
