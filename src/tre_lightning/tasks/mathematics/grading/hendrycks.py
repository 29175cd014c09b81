r"""The string comparison of Hendrycks et al. 2021 (arXiv 2103.03874), as verl's MATH reward has it.

Two answers are equal if the same rewriting makes the same text of both. Nothing is computed: 2/4
does not equal 1/2, and ``x=5`` equals 5 because a name of one letter before ``=`` is cut off. The
rules and their order are those of the published code, its oddities included (an answer that ends in
``\sqrt`` or ``\frac``, or has two units, is compared as it is written); the code is not.
"""

import re

# What is cut out, and what is written in another way; in this order.
_REPLACED = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_UNIT = "\\text{ "  # only ever before a unit, in the data set
_FRACTION = re.compile(r"(-?[1-9][0-9]*|0)/(-?[1-9][0-9]*|0)")


def hendrycks_equal(gold: str, answer: str) -> bool:
    """Whether the two become the same text."""
    try:
        return rewritten(gold) == rewritten(answer)
    except ValueError:
        return gold == answer


def hendrycks_box(response: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, None where there is none or it does not close.

    ``\boxed 5$`` counts too, up to the dollar sign; ``\fbox{...}`` never does.
    """
    if "\\boxed " in response:
        return response.rpartition("\\boxed ")[2].partition("$")[0]
    command, depth = "\\boxed{", 0
    start = response.rfind("\\boxed")
    if start < 0 or not response.startswith(command, start):
        return None
    for brace in re.finditer(r"[{}]", response[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return response[start + len(command) : start + brace.start()]
    return None


def rewritten(answer: str) -> str:
    r"""The text that is compared.

    Raises:
        ValueError: for a ``\sqrt`` or ``\frac`` with nothing after it, or two units.
    """
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    if answer.count(_UNIT) > 1:
        raise ValueError("two units")
    answer = answer.partition(_UNIT)[0]
    answer = answer.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not answer:
        return answer
    if answer.startswith("."):
        answer = "0" + answer
    name, equals, value = answer.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        answer = value
    answer = _braced_roots(answer).replace(" ", "")
    answer = _braced_fractions(answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    found = _FRACTION.fullmatch(answer)
    return f"\\frac{{{found[1]}}}{{{found[2]}}}" if found else answer


def _braced_roots(answer: str) -> str:
    r"""``\sqrt3`` as ``\sqrt{3}``."""
    first, *rest = answer.split("\\sqrt")
    if "" in rest:
        raise ValueError("nothing under a root")
    return first + "".join(
        "\\sqrt" + (part if part.startswith("{") else f"{{{part[0]}}}{part[1:]}") for part in rest
    )


def _braced_fractions(answer: str) -> str:
    r"""``\frac12`` and ``\frac1{2}`` as ``\frac{1}{2}``; as it is where one has no second part."""
    first, *rest = answer.split("\\frac")
    if "" in rest and all(
        part.startswith("{") or len(part) >= 2 for part in rest[: rest.index("")]
    ):
        raise ValueError("nothing in a fraction")
    if any(not part.startswith("{") and len(part) < 2 for part in rest):
        return answer
    return first + "".join("\\frac" + _braced_fraction(part) for part in rest)


def _braced_fraction(part: str) -> str:
    if part.startswith("{"):
        return part
    above, below, rest = part[0], part[1], part[2:]
    return f"{{{above}}}{below if below == '{' else f'{{{below}}}'}{rest}"
