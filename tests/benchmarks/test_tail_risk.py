"""Tests of benchmarks/tail_risk.py: its judgement by hand, and one quick run."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tail_risk
import torch
from tail_risk import COMMA, EQUALS, MINUS, PLUS, QUICK, VOCABULARY, WORDS

NAMES = {"+": PLUS, "-": MINUS, "=": EQUALS, ",": COMMA, "?": VOCABULARY - 1, "!": WORDS}


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[NAMES[w] if w in NAMES else int(w) for w in text.split()]])


def kinds(text: str) -> str:
    """A letter for each token after the first: . f(oreign) m(isplaced) w(rong)."""
    letters = ["." for _ in text.split()[1:]]
    for letter, found in zip("fmw", tail_risk.damage(ids(text)), strict=True):
        for place in found[0].nonzero().flatten().tolist():
            assert letters[place] == "."
            letters[place] = letter
    return "".join(letters)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 5 = 8 , 8 - 2 = 6 , 6", "............"),
        ("3 + 5 = 9 , 9 - 2 = 7", "...w......"),  # the chain goes on from what stands there
        ("3 + 5 = 9 , 8 - 2 = 6", "...w.w...."),
        ("3 - 5 = 0 , 0", "...w.."),  # no number is right
        ("15 + 5 = 1 , 1", "...w.."),
        ("3 + 19 = 1", "...w"),
        ("3 - 3 = 0 , 0", "......"),
        ("3 ? 5 ! 8 , 8", "f.f..."),
        ("3 5 + = 8 , 8", "mm.w.."),
        ("3 + = , = 3 3", ".mmmmw"),
        ("3 +", "."),
        ("3 + 5 =", "..."),
    ],
)
def test_damage_is_told_by_kind(text: str, expected: str) -> None:
    assert kinds(text) == expected


def test_chains_are_right_and_different() -> None:
    streams = tail_risk.chains(200, 8, torch.Generator().manual_seed(0))
    assert streams.shape == (200, 49)
    assert not any(found.any() for found in tail_risk.damage(streams))
    assert set(streams[:, 2].tolist()) == set(range(1, 10))
    assert set(streams[:, 1].tolist()) == {PLUS, MINUS}


def test_masses_of_uniform_and_certain_distributions() -> None:
    right = ids("3 + 5 = 8 , 8")
    uniform = tail_risk.masses(torch.full((1, 6, VOCABULARY), 1 / VOCABULARY), right)
    counts = [(VOCABULARY * part[0]).round().int().tolist() for part in uniform]
    foreign, misplaced, wrong = counts
    assert foreign == [VOCABULARY - 24] * 6
    assert misplaced == [22, 4, 23, 4, 23, 4]
    assert wrong == [0, 0, 0, 19, 0, 19]
    told = ids("3 - ! , 7 , 8")  # p is certain of these; the ids before each token are right
    certain = torch.nn.functional.one_hot(told[:, 1:], VOCABULARY).double()
    assert [part[0].tolist() for part in tail_risk.masses(certain, right)] == [
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
    ]


def test_survival_counts_rows_without_damage_so_far() -> None:
    damaged = torch.zeros(4, 50, dtype=torch.bool)
    damaged[0, 11] = damaged[1, 12] = damaged[1, 40] = damaged[2, 48] = True
    assert tail_risk.survival(damaged) == {"12": 0.75, "48": 0.5}


def test_crossing_and_prediction() -> None:
    assert tail_risk.crossing([1.0, 1.5, 1.25, 2.0], 1.25) == (0, 0.5)
    assert tail_risk.crossing([1.0, 0.5, 2.0], 1.25) == (1, 0.5)
    assert tail_risk.crossing([1.0, 1.5], 1.6) is None
    assert tail_risk.predicted({"foreign": 0.5, "misplaced": 0.1}, 3) == 0.125


def test_mass_at_a_gain_lies_between_its_steps() -> None:
    path = [{"entropy": e, "wrong": w} for e, w in ((1.0, 0.1), (1.5, 0.3), (2.0, 0.2))]
    found = [tail_risk.at_gain(path, gain, "wrong") for gain in (0.25, 0.75, 1.1)]
    assert found[:2] == pytest.approx([0.2, 0.25]) and math.isnan(found[2])


def test_shares_of_streams_have_t_intervals() -> None:
    point = {"foreign": 0.0, "misplaced": 0.0, "wrong": 0.0, "entropy": 1.0, "at_step": 0.0}

    def cell(share: float) -> dict[str, object]:
        shares = {"12": share, "192": share}
        return {"start": {**point, "known": shares, "valid": shares, "right": shares}}

    # mean .2, standard error .1 / sqrt(3), times 4.3027
    three = tail_risk.numbers([cell(s) for s in (0.1, 0.2, 0.3)], "start", "-", 192)
    assert three[0] == "3 of 3" and three[6] == "0.20 (-0.05 to 0.45)"
    assert tail_risk.numbers([cell(0.1)], "start", "-", 192)[6] == "0.10"


@pytest.mark.parametrize("direction", ["adam", "gradient"])
@pytest.mark.parametrize("method", tail_risk.METHODS)
def test_every_step_has_the_same_length_and_raises_the_objective(
    method: str, direction: str
) -> None:
    model = tail_risk.build(QUICK.hidden, 0)
    model.get_output_embeddings().weight.data *= 30.0  # an untrained policy is nearly uniform
    start = tail_risk.parameters_to_vector(model.parameters()).detach().clone()
    rollouts = tail_risk.sample(model, QUICK.step_rows, 24, "test")
    term = tail_risk.METHODS[method]()
    sizes = replace(QUICK, direction=direction, step_length=0.01)
    path = tail_risk.climb(model, term, rollouts, sizes)
    assert len(path) == sizes.steps + 1
    assert torch.equal(path[0], start)  # later steps leave earlier ones alone
    for before, after in itertools.pairwise(path):
        assert (after - before).norm().item() == pytest.approx(sizes.step_length, rel=1e-2)
    (region,) = term.regions
    objective = []
    for parameters in path:
        tail_risk.load(model, parameters)
        with torch.no_grad():
            logits = tail_risk.logits_of(model, rollouts)
            stats = tail_risk.token_stats(logits, rollouts[:, 1:], [region])
        objective.append(stats.entropies[region].scaled.mean().item())
    assert objective == sorted(objective) and objective[0] < objective[-1]


def test_quick_run_writes_its_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["tail_risk.py", "--quick", "--workers", "1", "--out", str(tmp_path)]
    )
    tail_risk.main()
    (row,) = tail_risk.read_rows(tmp_path / "rows.jsonl")
    assert list(row["methods"]) == list(tail_risk.METHODS)
    for found in row["methods"].values():
        path, start = found["path"], row["start"]
        assert path[0] == {name: start[name] for name in path[0]}  # all leave from one start
        point = found["sampled"]["step 1"]
        assert {name: point[name] for name in path[1]} == path[1]
    for part in (tmp_path / "tables.md").read_text().split("\n\n"):
        lines = part.splitlines()
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > len(row["methods"])

    monkeypatch.setattr(tail_risk, "run_cell", None)  # the row that is there is not run again
    tail_risk.main()
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row
