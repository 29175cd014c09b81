r"""Agreement, speed and survival of the MATH scorer on real data.

    python benchmarks/math_scorer.py --data DIR [--size 1000] [--out FILE] [--show HardVerify]

DIR holds, as JSON lines: math500.jsonl (problem, answer, solution), math_train_problem_answer.jsonl
(problem, answer), math_graded_outputs_qwen.jsonl (response, gold, source_grade) and
math_hardverify_dev.jsonl (gold, pred, label). Needs math-verify 0.9.

Three graders are compared on each set: ours, math-verify as it comes, and the string comparison of
hendrycks/math (MIT licence), which the authors of Trust Region Entropy score with. A false negative
is a right answer that scores 0, a false positive a wrong one that scores 1. The labels of the
generated sets hold by construction; those of the graded outputs are verdicts of another grader, and
those of HardVerify come from language models. Formulas that are copied from the question into the
box have no label: a factored polynomial equals the expanded one, though the question shows it.

With --size 1000 this takes two to three minutes, nearly all of them in math-verify. Results:
docs/math_scorer.md.
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from tre_lightning.tasks.mathematics.grading.reader import read as read_form
from tre_lightning.tasks.mathematics.scorer import MathScorer, last_boxed


class Case(NamedTuple):
    """One answer with its label."""

    response: str
    gold: str
    right: bool


# --- The sets ------------------------------------------------------------------------------------


def rewritings(gold: str) -> Iterator[str]:
    """Other ways to write this answer, by rules that hold whatever the question was."""
    yield f"${gold}$"
    yield f" {gold} "
    if re.search(r"\\frac", gold):
        yield gold.replace("\\frac", "\\dfrac")
    if "\\left" not in gold and re.match(r"^\(.*\)$", gold):
        yield gold.replace("(", "\\left(").replace(")", "\\right)")
    whole = re.fullmatch(r"-?\d+", gold)
    plain = whole or re.fullmatch(r"-?\d+\.\d+|(-?)\\frac\{(\d+)\}\{(\d+)\}", gold)
    if plain:
        yield f"x={gold}"
        yield f"x = {gold}"
        yield f"{gold}\\text{{ units}}"
    if whole:
        yield f"{gold}.0"
        yield f"\\frac{{{2 * int(gold)}}}{{2}}"
        yield f"\\text{{{gold}}}"
        if abs(int(gold)) > 999:
            yield f"{int(gold):,}"
            yield f"{int(gold):,}".replace(",", "\\,")
            yield f"{int(gold):,}".replace(",", "{,}")
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", gold)
    if fraction:
        sign, upper, lower = fraction[1], int(fraction[2]), int(fraction[3])
        yield f"{sign}{upper}/{lower}"
        yield f"\\frac{{{sign}{upper}}}{{{lower}}}"
        yield f"{sign}\\frac{{{3 * upper}}}{{{3 * lower}}}"
        if upper > lower > 1:
            yield f"{sign}{upper // lower}\\frac{{{upper % lower}}}{{{lower}}}"
        value = Fraction(upper, lower)
        if 10**6 % value.denominator == 0:
            yield f"{sign}{float(value):.6f}".rstrip("0").rstrip(".")
    decimal = re.fullmatch(r"(-?)(\d*)\.(\d+)", gold)
    if decimal:
        yield f"{gold}0"
        yield f"{decimal[1]}\\frac{{{int(decimal[2] + decimal[3])}}}{{{10 ** len(decimal[3])}}}"
    root = re.fullmatch(r"(\d+)\\sqrt\{(\d+)\}", gold)
    if root:
        yield f"\\sqrt{{{int(root[1]) ** 2 * int(root[2])}}}"
        yield f"\\sqrt{{{root[2]}}} \\cdot {root[1]}"
    if re.fullmatch(r"\d+\\pi", gold):
        yield f"\\pi \\cdot {gold[:-3]}"
    if re.fullmatch(r"[0-9a-z+\- ^{}]+", gold) and re.search(r"[a-z]", gold):
        terms = re.findall(r"[+-]?[^+-]+", gold.replace(" ", ""))
        if len(terms) > 1 and "{" not in gold:
            yield "".join(t if t[0] in "+-" else f"+{t}" for t in reversed(terms)).lstrip("+")
            yield f"({gold})"
    listed = re.fullmatch(r"[^(\[{\\]+(?:, ?[^(\[{\\]+)+", gold)
    if listed and not re.search(r",\d{3}(?!\d)", gold):
        items = [item.strip() for item in gold.split(",")]
        yield ", ".join(reversed(items))
        yield "\\{" + ", ".join(items) + "\\}"
        yield ", ".join(items[:-1]) + " \\text{ and } " + items[-1]
    if re.fullmatch(r"[\[(]-?\d+,-?\d+[\])]", gold.replace(" ", "")):
        yield gold.replace(",", " , ")
    if "\\infty" in gold and "+\\infty" not in gold:
        yield re.sub(r"(?<![-+])\\infty", r"+\\infty", gold)
    ray = re.fullmatch(r"\((-?\d+),\s*\\infty\)", gold)
    if ray:
        yield f"x > {ray[1]}"
    if re.fullmatch(r"[\d.]+\^\\circ", gold):
        yield gold.removesuffix("^\\circ")
        yield gold.replace("^\\circ", "^{\\circ}")
        yield gold.replace("^\\circ", "\\text{ degrees}")
    unit = re.fullmatch(r"([\d.]+) ?\\(?:text|mbox)\{ ?([a-z ]+)\}", gold)
    if unit:
        yield unit[1]
        yield f"{unit[1]} \\mathrm{{{unit[2]}}}"
    if gold.endswith("\\%"):
        yield gold.removesuffix("\\%")
        yield gold.replace("\\%", "%")
    if gold.startswith("\\$"):
        yield gold.removeprefix("\\$")
    word = re.fullmatch(r"\\text\{([A-Za-z]+)\}", gold)
    if word:
        yield word[1]
        yield f"\\mathrm{{{word[1]}}}"
    letter = re.fullmatch(r"\\text\{\(([A-Z])\)\}", gold)
    if letter:
        yield letter[1]
        yield f"({letter[1]})"
    if "pmatrix" in gold:
        yield gold.replace("pmatrix", "bmatrix")
    based = re.fullmatch(r"(\d+)_(\d+)", gold)
    if based:
        yield f"{based[1]}_{{{based[2]}}}"


def near_misses(gold: str) -> Iterator[str]:
    """Answers that differ from this one, by rules that hold whatever the question was."""
    yield f"{gold} \\text{{ or }} 123456"
    yield f"{gold}, 123456"
    digits = list(re.finditer(r"\d", gold))
    if digits:
        last = digits[-1]
        yield gold[: last.start()] + str((int(last[0]) + 1) % 10) + gold[last.end() :]
        first = digits[0]
        yield gold[: first.start()] + str(int(first[0]) % 9 + 1) + gold[first.end() :]
    if re.fullmatch(r"-?[\d.]+|-?\\frac\{\d+\}\{\d+\}", gold) and gold.strip("-") != "0":
        yield gold.removeprefix("-") if gold.startswith("-") else f"-{gold}"
        yield f"{gold}t"
        yield f"{gold}+10^{{-9}}"
        yield f"{gold} \\text{{ million}}"
    if re.fullmatch(r"-?\d+", gold):
        yield f"{gold}_7"
        yield f"{gold}\\frac{{1}}{{2}}"
        yield f"\\sqrt{{{abs(int(gold)) + 2}}}"
        yield f"{gold}.01"
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", gold)
    if fraction:
        sign, upper, lower = fraction[1], int(fraction[2]), int(fraction[3])
        if upper != lower:
            yield f"{sign}\\frac{{{lower}}}{{{upper}}}"
        if 10**7 % Fraction(upper, lower).denominator:
            yield f"{sign}{upper / lower:.3f}"
            yield f"{sign}{upper / lower:.7f}"
    interval = re.fullmatch(r"([\[(])(.*)([\])])", gold)
    if interval and "," in gold and "cup" not in gold:
        yield {"(": "[", "[": "("}[interval[1]] + interval[2] + interval[3]
        yield interval[1] + interval[2] + {")": "]", "]": ")"}[interval[3]]
        items = interval[2].split(",")
        if len(items) == 2 and items[0].strip() != items[1].strip():
            yield f"{interval[1]}{items[1]},{items[0]}{interval[3]}"
    based = re.fullmatch(r"(\d+)_(\d+)", gold)
    if based:
        yield f"{based[1]}_{{{int(based[2]) + 1}}}"
        yield based[1]
    if re.fullmatch(r"[a-z]", gold):
        yield f"{gold}_7"
        yield gold.upper()
    if re.search(r"[a-z]", gold) and re.fullmatch(r"[0-9a-z+\- ^{}]+", gold):
        yield f"{gold} + 1"
        yield f"2({gold})"
    if "\\pi" in gold:
        yield gold.replace("\\pi", "3.14159")
    if "\\sqrt" in gold:
        yield gold.replace("\\sqrt", "")


def value_of(gold: str) -> str:
    """A gold without what may be left out of it, to find golds that are the same answer."""
    text = re.sub(r"\\(?:text|mbox|textnormal|mathbf)\s*\{[^}]*\}(\^\{?\d\}?)?", "", gold)
    text = text if re.search(r"\w", text) else gold
    text = re.sub(r"\\left|\\right|\\!|\\,|\\;|\^\{?\\circ\}?|\\%|\\\$|\s|\{,\}|[.,]$", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\{(\d+)\}(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"_\{?(\d+)\}?", r"_\1", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if text.count("(") == 0 else text
    text = text.split("=")[-1].lower()
    mixed = re.fullmatch(r"(-?)(\d*)\\frac\{(-?\d+)\}\{(\d+)\}", text)
    if mixed:
        value = Fraction(int(mixed[3]), int(mixed[4])) + int(mixed[2] or 0)
        return str(-value if mixed[1] else value)
    ratio = re.fullmatch(r"(-?\d+)[/:]([1-9]\d*)", text)
    if ratio:
        return str(Fraction(int(ratio[1]), int(ratio[2])))
    return str(Fraction(text)) if re.fullmatch(r"-?\d*\.?\d+", text) else text


def other_golds(golds: list[str], size: int) -> Iterator[Case]:
    """Each gold against golds of other questions: random ones and its neighbours in the order."""
    chance = random.Random(0)
    distinct = sorted({g for g in golds}, key=lambda g: (re.sub(r"\d", "0", g), g))
    for _ in range(size):
        i = chance.randrange(len(distinct) - 1)
        for j in (i + 1, chance.randrange(len(distinct))):
            gold, other = distinct[i], distinct[j]
            if value_of(gold) != value_of(other):
                yield Case(boxed(other), gold, False)


def boxed(answer: str) -> str:
    """A response with this answer."""
    return f"Therefore, the answer is $\\boxed{{{answer}}}$."


def build_sets(data: Path, size: int) -> dict[str, list[Case]]:
    """The labelled sets by name."""
    rows = {path.stem: read(path) for path in data.glob("math*.jsonl")}
    test, train = rows["math500"], rows["math_train_problem_answer"]
    golds = [row["answer"] for row in test + train]
    by_form: dict[str, list[str]] = {}
    for gold in golds:  # one gold of each form at first, or most would be small integers
        by_form.setdefault(re.sub(r"\d+", "0", gold), []).append(gold)
    spread = [gold for k in range(20) for same in by_form.values() for gold in same[k : k + 1]]
    rewritten = [Case(boxed(r), g, True) for g in spread for r in dict.fromkeys(rewritings(g))]
    missed = [Case(boxed(m), g, False) for g in spread for m in dict.fromkeys(near_misses(g))]
    # Sets of their own: each is one rule, which a grader gets right or wrong as a whole.
    stopped = [Case(boxed(f"{g}."), g, True) for g in spread]
    chained = [Case(boxed(f"1=2=3={g}"), g, False) for g in spread]
    graded = rows["math_graded_outputs_qwen"]
    hard = rows["math_hardverify_dev"]
    return {
        "reference solutions": [Case(row["solution"], row["answer"], True) for row in test],
        "rewritten golds": sampled(rewritten, size),
        "full stop in the box": sampled(stopped, size),
        "near misses": sampled(missed, size),
        "1=2=3=gold": sampled(chained, size),
        "other golds": list(other_golds(golds, size // 2)),
        "graded outputs": [
            Case(row["response"], row["gold"], bool(row["source_grade"])) for row in graded
        ],
        "HardVerify": [Case(boxed(row["pred"]), row["gold"], bool(row["label"])) for row in hard],
    }


def sampled(cases: list[Case], size: int) -> list[Case]:
    """So many of the cases, at random, the same each time."""
    return random.Random(0).sample(cases, min(size, len(cases)))


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def copied_questions(data: Path, size: int) -> list[Case]:
    """Formulas of each question, boxed as they stand; most are not the answer."""
    cases = []
    for row in read(data / "math_train_problem_answer.jsonl"):
        for formula in re.findall(r"(?<!\\)\$([^$]+)\$|\\\[(.*?)\\\]", row["problem"], re.DOTALL):
            text = "".join(formula).strip().rstrip(".,?")
            if re.search(r"[-+*/^\\]", text) and text != row["answer"]:
                cases.append(Case(boxed(text), row["answer"], False))
    random.Random(0).shuffle(cases)
    return cases[:size]


# --- The graders ---------------------------------------------------------------------------------

Grader = Callable[[list[Case]], list[float]]


def math_verify_grader(cases: list[Case]) -> list[float]:
    """math-verify with its defaults, gold in a box too."""
    from math_verify import parse, verify

    scores = []
    for case in cases:
        gold = parse(f"\\boxed{{{case.gold}}}", parsing_timeout=3)
        answer = parse(case.response, parsing_timeout=3)
        scores.append(float(verify(gold, answer, timeout_seconds=3)))
    return scores


def string_grader(cases: list[Case]) -> list[float]:
    """Equality of normalised strings, after hendrycks/math."""
    scores = []
    for case in cases:
        answer = last_boxed(case.response)
        same = answer is not None and stripped(answer) == stripped(case.gold)
        scores.append(float(same))
    return scores


def stripped(text: str) -> str:
    """The normal form of hendrycks/math (MIT licence), ``math_equivalence.py``."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if text.count("\\text{ ") == 1:
        text = text.split("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    slash = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return f"\\frac{{{slash[1]}}}{{{slash[2]}}}" if slash else text


# --- Speed and survival --------------------------------------------------------------------------


def attacks() -> list[str]:
    """Responses meant to hang, crash or overflow a grader."""
    answers = [
        "9^{9^{9^9}}",
        "2^{99999999999}",
        "10^{10^{10^{10}}}",
        "e^{e^{e^{e^{9}}}}",
        "\\exp(\\exp(\\exp(\\exp(9))))",
        "100000000!",
        "3!!!!",
        "\\binom{1000000}{500000}",
        "(x+y+z+1)^{400}",
        "(x+y+z+1)^{400}-(x+y)^{399}",
        "(" * 800 + "1" + ")" * 800,
        "(" * 11 + "x+1" + ")" * 11,
        "{" * 800 + "1" + "}" * 800,
        "\\frac{1}{" * 300 + "2" + "}" * 300,
        "\\frac{1}{" * 11 + "x" + "}" * 11,
        "\\sqrt{" * 11 + "x" + "}" * 11,
        "\\sqrt[3]{" * 300 + "2" + "}" * 300,
        "|" * 500 + "x" + "|" * 500,
        "x^" * 400 + "2",
        "x_" * 400 + "2",
        "-" * 900 + "1",
        "1+" * 450 + "1",
        "+".join(f"\\sin({k}x)^{{{k}}}" for k in range(1, 60)),
        "\\sum_{k=1}^{10^{10}} k",
        "\\int_0^1 x^x dx",
        "\\prod_{n=1}^{\\infty} n",
        "\\begin{pmatrix}" + "1 & " * 200 + "1\\end{pmatrix}",
        "1," * 450 + "1",
        "\\pm 1" * 100,
        "1,000" * 180,
        "9" * 990,
        "0." + "9" * 990,
        "10^{9999}",
        "\\frac{1}{2^{98}}",
        "\\0\0\0",
        "\ud800",
        "5\ud800\udfff",
        "\U0001d7d9" * 300,
        "\\text{" * 100 + "}" * 100,
        "__import__('os').system('true')",
        "x" * 1_000_000,
        "\\frac{1}{2}+" * 90_000 + "1",
    ]
    responses = [boxed(answer) for answer in answers]
    responses += [
        "\\boxed{" * 200_000,
        "\\boxed{5" + "{" * 1_000_000,
        "{" * 500_000 + "}" * 500_000 + "\\boxed{",
        "\\" * 1_000_001 + "boxed{1}",
        "\\boxed" + " " * 1_000_000,
        "\\boxed " * 150_000,
        "\\boxed{\\" * 100_000,
        "\0" * 1_000_000,
        "\ud800" * 100_000,
    ]
    return responses


def main() -> None:
    """Run everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the JSONL files")
    parser.add_argument("--size", type=int, default=1000, help="cases in a generated set")
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--show", help="print the errors of ours on this set")
    args = parser.parse_args()
    result: dict[str, object] = {}
    with MathScorer() as scorer:
        scorer.start()

        def ours(cases: list[Case]) -> list[float]:
            return scorer.score([c.response for c in cases], [c.gold for c in cases])

        graders: dict[str, Grader] = {
            "ours": ours,
            "math-verify": math_verify_grader,
            "string": string_grader,
        }
        result["agreement"] = compare(build_sets(args.data, args.size), graders, args.show)
        copied = copied_questions(args.data, args.size)
        accepted = {name: sum(grade(copied)) for name, grade in graders.items()}
        print(f"\nformulas of the question itself, boxed: {len(copied)}; accepted: {accepted}")
        result["copied"] = {"cases": len(copied), "accepted": accepted}
        result["speed"] = measure_speed(args.data)
        result["survival"] = measure_survival(scorer)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def compare(
    sets: dict[str, list[Case]], graders: dict[str, Grader], show: str | None
) -> dict[str, object]:
    """Errors of each grader on each set."""
    table: dict[str, object] = {}
    print(f"{'set':22}{'right':>6}{'wrong':>6}" + "".join(f"{n:>22}" for n in graders))
    print(" " * 34 + "".join(f"{'FN      FP':>22}" for _ in graders))
    for name, cases in sets.items():
        right = sum(case.right for case in cases)
        line = f"{name:22}{right:6}{len(cases) - right:6}"
        entry: dict[str, object] = {"right": right, "wrong": len(cases) - right}
        for grader, grade in graders.items():
            scores = grade(cases)
            missed = [c for c, s in zip(cases, scores, strict=True) if c.right and not s]
            false = [c for c, s in zip(cases, scores, strict=True) if s and not c.right]
            entry[grader] = {"false_negatives": len(missed), "false_positives": len(false)}
            line += f"{len(missed):>14}{len(false):>8}"
            if grader == "ours" and show == name:
                for kind, errors in [("FN", missed), ("FP", false)]:
                    for case in errors:
                        print(kind, repr(case.gold), repr(last_boxed(case.response)))
        print(line, flush=True)
        table[name] = entry
    print("Labels of the last two are verdicts of another grader and of language models.")
    return table


def measure_speed(data: Path, repetitions: int = 5) -> dict[str, object]:
    """Answers per second on the reference answers, right and wrong; workers and caches are new."""
    rows = read(data / "math500.jsonl")
    answers = [row["solution"] for row in rows]
    golds = [row["answer"] for row in rows]
    wrong = golds[1:] + golds[:1]
    rewritten = [(boxed(r), g) for g in golds for r in list(rewritings(g))[3:5]]
    responses = answers + answers + [r for r, _ in rewritten]
    seconds = []
    for _ in range(repetitions):
        read_form.cache_clear()
        with MathScorer(workers=2) as scorer:
            scorer.start()
            begin = time.perf_counter()
            scorer.score(responses, golds + wrong + [g for _, g in rewritten])
            seconds.append(time.perf_counter() - begin)
    rates = sorted(len(responses) / s for s in seconds)
    rate = statistics.median(rates)
    print(
        f"\n{len(responses)} ordinary answers: {rate:.0f}/s, median of {repetitions} repetitions "
        f"({rates[0]:.0f} to {rates[-1]:.0f}/s)"
    )
    return {"answers": len(responses), "seconds": seconds, "per_second": rate}


def measure_survival(scorer: MathScorer) -> dict[str, float]:
    """All attacks, each against two golds, then 500 right answers."""
    golds = ["5", "x^2+\\sqrt{2}"]
    pairs = [(attack, gold) for attack in attacks() for gold in golds]
    scorer.timeouts()
    begin = time.perf_counter()
    scores = scorer.score([a for a, _ in pairs], [g for _, g in pairs])
    seconds = time.perf_counter() - begin
    given_up = scorer.timeouts()
    good = scorer.score(
        [boxed(f"\\sqrt{{{3 * k * k}}}") for k in range(2, 502)],
        [f"{k}\\sqrt{{3}}" for k in range(2, 502)],
    )
    print(
        f"{len(pairs)} attacks in {seconds:.1f} s: {given_up} timed out, {sum(scores):.0f} scored; "
        f"of 500 right answers after that {sum(good):.0f} score 1"
    )
    return {
        "attacks": len(pairs),
        "seconds": seconds,
        "timeouts": given_up,
        "scored": sum(scores),
        "right_after": sum(good),
    }


if __name__ == "__main__":
    main()
