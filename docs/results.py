"""Write the tables and figures of the docs from docs/results: python docs/results.py.

Each file there is the ``results.json`` of a comparison (``python -m tre_lightning.compare``); copy
a new one over it to publish new runs. A table stands between ``<!-- NAME KIND [METHOD ...] -->``
and ``<!-- end -->``: NAME is the file's, KIND ``final``, ``paired``, ``sweep`` or ``seeds``; with
``paired``, methods are what to subtract and what to subtract from. The figures need matplotlib.
"""

import re
import sys
from pathlib import Path

from tre_lightning.compare.curves import draw
from tre_lightning.compare.report import final_table, paired_table, seeds_table, sweep_table
from tre_lightning.compare.results import read_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
PAGES = [ROOT / page for page in ("README.md", "docs/evidence.md", "docs/evidence_log.md")]
MARKED = re.compile(
    r"(?<=<!-- )(\w+) (final|paired|sweep|seeds) ([\w ]*)-->\n.*?(?=<!-- end -->)", re.DOTALL
)

sys.path.append(str(ROOT / "benchmarks"))
import horizon  # noqa: E402


def filled(page: str) -> str:
    """A page with its tables written anew."""

    def anew(match: re.Match[str]) -> str:
        first = match[0].splitlines()[0]
        return f"{first}\n\n{_table(*match.groups())}\n"

    return MARKED.sub(anew, page)


def _table(name: str, kind: str, methods: str) -> str:
    results = read_results(RESULTS / f"{name}.json")
    if kind == "paired":
        baseline, *others = methods.split() or [None]
        return paired_table(results, baseline, others)
    return {"final": final_table, "sweep": sweep_table, "seeds": seeds_table}[kind](results)


def figures(directory: Path) -> None:
    """Draw the curves of the comparisons that the pages show, and the differences by length."""
    shown = "".join(page.read_text() for page in PAGES)
    for file in RESULTS.glob("*.json"):
        if (image := f"compare_{file.stem}.png") in shown:
            draw(read_results(file), directory / image)
    horizon.draw(map(read_results, RESULTS.glob("horizon_*.json")), directory / "horizon.png")


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    figures(IMAGES)
