import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import runs
import tre_lightning.compare.run
from tre_lightning.cli.main import main as fit
from tre_lightning.common.paths import locked
from tre_lightning.compare.__main__ import main
from tre_lightning.compare.curves import gather
from tre_lightning.compare.plan import Method, Plan, Trial, read_plan, specification
from tre_lightning.compare.report import metric, paired_table, report, seeds_table
from tre_lightning.compare.results import (
    Outcome,
    collect,
    read_results,
    thinned,
    write_results,
)
from tre_lightning.compare.run import Runner, _Running, choose
from tre_lightning.compare.statistics import (
    differences,
    estimate,
    holm,
    mean,
    p_value,
    t_quantile,
)
from tre_lightning.compare.trial import RESULT, SPECIFICATION, late_mean, read_curves

PLANS = runs.CONFIGS / "compare"
METHOD = {
    "trainer": {
        "callbacks+": [
            {"class_path": "tre_lightning.methods.TrustRegionEntropy", "init_args": {"top_k": 2}}
        ]
    }
}
METHODS = {"m": Method("m.yaml", "coef", [1, 2]), "p": Method()}


def write_plan(folder: Path, **changes: Any) -> Path:
    """Two methods x two values x two seeds of the tiny run; ``changes`` replace whole fields."""
    base = json.loads(json.dumps(runs.TINY))
    base["trainer"].pop("callbacks")
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "tre.yaml").write_text(yaml.safe_dump(METHOD))
    plan = {
        "configs": ["base.yaml"],
        "set": {"trainer.max_epochs": 1, "data.init_args.iterations_per_epoch": 2},
        "output": str(folder / "out"),
        "sweep_seeds": [1],
        "seeds": [2],
        "baseline": "clip",
        "methods": {
            "clip": {"option": "model.ppo.clip_eps_high", "values": [0.2, 0.4]},
            "tre": {"config": "tre.yaml", "option": "coef", "values": [0.01, 0.1]},
        },
        **changes,
    }
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    return file


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., Path]:
    return lambda **changes: write_plan(tmp_path, **changes)


def made_up(plan: Plan, trial: Trial, final: float | None, **test: float | None) -> None:
    """A finished trial that never ran."""
    directory = trial.directory(plan)
    directory.mkdir(parents=True)
    result = {
        **{"method": trial.method, "value": trial.value, "seed": trial.seed, "iterations": 2},
        "final": {"val/pass@1": final},
        "test": {f"test/{tag}": value for tag, value in test.items()},
        "late": {"loss/tre_effective_coef": 0.5} if trial.method == "tre" else {},
    }
    (directory / RESULT).write_text(json.dumps(result))


# ----- a whole comparison


@pytest.fixture
def forked_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are forks of this process, without the seconds of their imports."""

    def start(words: list[str], env: dict[str, str], stdout: IO[bytes], **_: Any) -> runs.Fork:
        assert words[:3] == [sys.executable, "-m", "tre_lightning.compare"]
        return runs.Fork(lambda: main(words[3:]), env, stdout)

    forking = SimpleNamespace(**{**vars(subprocess), "Popen": start})
    monkeypatch.setattr(tre_lightning.compare.run, "subprocess", forking)


@pytest.mark.usefixtures("forked_trials")
def test_comparison_resumes_after_a_kill_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_plan(tmp_path)
    plan = read_plan(file)
    first = Trial("clip", 0.2, 1).directory(plan)
    hold = tmp_path / "held"
    command = [sys.executable, "-m", "tre_lightning.compare", "--config", str(file), "--jobs", "2"]

    # Ctrl-C in the second iteration of the first trial, of processes of their own
    extra = {"PYTHONPATH": runs.python_path(), "HOLD": "train:1", "HOLD_FILE": str(hold)}
    holding = {**os.environ, **extra}
    child = subprocess.Popen(command, env=holding, stderr=subprocess.PIPE, text=True)
    try:
        while not hold.exists() and child.poll() is None:
            time.sleep(0.05)
        assert runs.saved_iteration(first) == 1
        child.send_signal(signal.SIGINT)
        hold.unlink()
        assert (
            f"go on with python -m tre_lightning.compare --config {file}" in child.communicate()[1]
        )
    finally:
        child.kill()
    assert child.returncode == 130 and not (first / RESULT).exists()
    begun = {path.name: path.stat().st_mtime_ns for path in first.glob("events*")}

    main(command[3:])
    done = [line for line in capsys.readouterr().out.splitlines() if line.startswith("done ")]
    assert len(done) == 6
    results = sorted((tmp_path / "out" / "trials").glob("*/*/result.json"))
    assert len(results) == 6  # 2 x 2 x 1 chose, 2 x 1 x 1 are reported
    for result in map(json.loads, (result.read_text() for result in results)):
        assert result["iterations"] == 2
        assert {"test/pass@1", "test/pass@2", "test/response_length"} <= result["test"].keys()
        assert all(tag.startswith("val/") for tag in result["final"])
        assert result["best"]["val/pass@1"] >= result["final"]["val/pass@1"]
        assert {"entropy/full", "entropy/tail_mass", "policy/approx_kl"} <= result["late"].keys()
    # the stopped trial went on beside what it had logged, and shows no step twice
    assert begun.keys() < {path.name for path in first.glob("events*")}
    assert [step for step, _ in runs.scalars(first)["entropy/full"]] == [0, 1]
    tre = json.loads((Trial("tre", 0.1, 1).directory(plan) / RESULT).read_text())
    assert tre["late"]["loss/tre_effective_coef"] == pytest.approx(0.1 * math.log(48) / math.log(2))
    # pairs: both methods start from the same warm start, and sample alike before the first update
    chosen = choose(plan)
    left, right = (read_curves(t.directory(plan)) for t in plan.final(chosen))
    assert left["entropy/full"][0] == right["entropy/full"][0]
    assert left["val/pass@1"][0] == right["val/pass@1"][0]
    means = read_curves(tmp_path / "out" / "mean" / "tre")
    assert means["entropy/full"] == right["entropy/full"]  # one seed is its own mean
    assert "Unfinished" not in (tmp_path / "out" / "report.md").read_text()
    kept = read_results(tmp_path / "out" / "results.json")
    (outcome,) = kept.final("tre").values()
    tested = json.loads((Trial("tre", chosen["tre"], 2).directory(plan) / RESULT).read_text())
    assert outcome.metrics["test/pass@2"] == pytest.approx(tested["test"]["test/pass@2"], rel=1e-5)
    assert outcome.curves["entropy/full"] == pytest.approx(right["entropy/full"], rel=1e-3)

    # nothing runs twice
    times = [result.stat().st_mtime_ns for result in results]
    main(command[3:])
    assert "done  " not in capsys.readouterr().out
    assert [result.stat().st_mtime_ns for result in results] == times

    # what is done is not counted as left
    (first / RESULT).unlink()
    main(command[3:])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("done  "))
    assert line.startswith("done    clip=0.2/seed=1") and " 0 left" in line


@pytest.mark.usefixtures("forked_trials")
def test_failed_trial_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a false top_k fails in its own process; the plan cannot see it
    file = write_plan(
        tmp_path,
        sweep_seeds=[],
        baseline="bad",
        methods={
            "bad": {"config": "tre.yaml", "option": "top_k", "values": [-1]},
            "worse": {"config": "tre.yaml", "option": "no_such_option", "values": [1]},
        },
    )
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(file)])
    out = capsys.readouterr()
    assert stopped.value.code == 1
    assert "FAILED  bad=-1/seed=2 (exit code 2): error: " in out.out and "top_k" in out.out
    assert "FAILED  worse=1/seed=2" in out.out  # went on
    assert out.err.splitlines()[-1] == "failed: bad=-1/seed=2, worse=1/seed=2"


# ----- the plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "methods": {
                    "clip": {"option": "model.ppo.clip_eps_high", "values": [0.2]},
                    "tre": {"config": "tre.yaml", "option": "coef", "values": [0.01, 0.1]},
                }
            },
            "clip 1, tre 2",
        ),
        ({"sweep_seeds": []}, "sweep_seeds is empty"),
        ({"sweep_seeds": [2, 3]}, "share [2]"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [5, 5]}, "repeated"),
        ({"baseline": "ppo"}, "one of clip, tre"),
        ({"configs": ["tre.yaml"]}, "every method brings its own"),
        ({"configs": ["gone.yaml"]}, "gone.yaml"),
        ({"set": {"seed_everything": 1}}, "set holds seed_everything"),
        ({"choose_by": "test/pass@1"}, "no validation metric"),
        ({"methods": {"clip": {"option": "coef", "values": [1]}}}, "config that holds it"),
        (
            {"methods": {"clip": {"config": "base.yaml", "option": "c", "values": [1]}}},
            "0 callback",
        ),
        ({"methods": {"clip": {"values": [1]}}}, "both option and values"),
        ({"methods": {"../clip": {}}}, "no name for a directory"),
        ({"colour": "red"}, "colour"),
        ({"seeds": "many"}, "seeds"),
    ],
)
def test_plan_that_cannot_work_is_one_line(
    plan_file: Callable[..., Path], changes: dict[str, Any], words: str, refusal: runs.Said
) -> None:
    assert words in refusal(main, ["--config", str(plan_file(**changes))], alone=True)


def test_another_plan_for_a_trial_that_exists_is_refused(
    plan_file: Callable[..., Path], tmp_path: Path, refusal: runs.Said
) -> None:
    file = plan_file()
    plan = read_plan(file)
    trial = Trial("tre", 0.1, 1)
    directory = trial.directory(plan)
    directory.mkdir(parents=True)
    (directory / SPECIFICATION).write_text(json.dumps(specification(plan, trial, tmp_path)))
    Runner(plan, tmp_path, 1).check()
    # the content of a file counts, not its name; a further seed or method changes no trial
    Runner(read_plan(plan_file(seeds=[2, 7])), tmp_path, 1).check()
    (tmp_path / "tre.yaml").write_text(yaml.safe_dump(METHOD).replace("top_k: 2", "top_k: 3"))
    assert "other configs" in refusal(main, ["--config", str(file)], alone=True)
    assert "other flags" in refusal(
        main, ["--config", str(plan_file(set={"trainer.max_epochs": 9}))], alone=True
    )


def test_value_goes_into_the_callback_or_becomes_a_flag(
    plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    plan = read_plan(plan_file())
    clip, tre = (
        specification(plan, t, tmp_path) for t in (Trial("clip", 0.4, 1), Trial("tre", 0.1, 1))
    )
    assert clip["flags"][-1] == "--model.ppo.clip_eps_high=0.4" and len(clip["configs"]) == 1
    (callback,) = yaml.safe_load(tre["configs"][-1])["trainer"]["callbacks+"]
    assert callback["init_args"] == {"top_k": 2, "coef": 0.1}
    assert len(plan.sweep) == 4 and len({trial.name for trial in plan.sweep}) == 4


def test_methods_without_an_option_take_part_in_the_sweep_once_a_seed() -> None:
    plan = Plan(["a"], {"m": METHODS["m"], "p": METHODS["p"]}, [1], "o", "p", sweep_seeds=[2, 3])
    assert [t.name for t in plan.sweep] == [
        *("m=1/seed=2", "m=2/seed=2", "p/seed=2"),
        *("m=1/seed=3", "m=2/seed=3", "p/seed=3"),
    ]
    one = Plan(["a"], {"p": METHODS["p"]}, [1], "o", "p", sweep_seeds=[2])
    assert one.sweep == []


def test_only_one_trial_of_a_seed_runs_before_its_warm_start_is_there() -> None:
    plan = Plan(["a"], {"m": METHODS["m"]}, [9], "o", "m", sweep_seeds=[1, 2])
    runner = Runner(plan, Path(), 4)
    waiting = plan.sweep

    def started(warm: set[int]) -> list[str]:
        rest, names = list(waiting), []
        runner._running.clear()
        while trial := runner._next(rest, warm):
            rest.remove(trial)
            names.append(trial.name)
            runner._running.append(_Running(trial, None))  # type: ignore[arg-type]
        return names

    assert started(set()) == ["m=1/seed=1", "m=1/seed=2"]
    assert started({1}) == ["m=1/seed=1", "m=2/seed=1", "m=1/seed=2"]


def test_two_processes_cannot_do_the_same_trial(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


# ----- numbers


@pytest.mark.parametrize(
    ("df", "expected"),  # of printed tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_t_quantile_is_that_of_tables(df: int, expected: float) -> None:
    assert t_quantile(df) == pytest.approx(expected, abs=5.1e-4)


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1, standard error 1 / sqrt(3), t 4.302653
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, -0.484138, 4.484138, 3), abs=1e-6)
    assert estimate([0.5] * 4) == (0.5, 0.5, 0.5, 4)


def test_p_value_by_hand() -> None:
    # two degrees of freedom: p = 1 - t / sqrt(2 + t^2), and t = 2 sqrt(3)
    assert p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert p_value([-1.0, -2.0, -3.0]) == p_value([1.0, 2.0, 3.0])
    assert p_value([0.0, 0.0]) == 1.0 and p_value([0.5, 0.5]) == 0.0
    assert math.isnan(p_value([0.5])) and math.isnan(p_value([0.5, math.nan]))


@given(st.lists(st.floats(-1.0, 1.0).map(lambda x: round(x, 3)), min_size=2, max_size=8))
def test_p_value_and_interval_agree_about_zero(values: list[float]) -> None:
    found, p = estimate(values), p_value(values)
    assert found.low <= found.mean <= found.high
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) == (not found.low <= 0.0 <= found.high)


def test_correction_for_several_comparisons_by_hand() -> None:
    # times 4, 3, 2, 1 from the smallest on, never falling, at most 1
    assert holm([0.01, 0.04, 0.5, 0.03]) == pytest.approx([0.04, 0.09, 0.5, 0.09])
    assert holm([0.4, math.nan, 0.6])[::2] == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("draw", "mean_of_all", "count", "covered"),
    [
        (torch.randn, 0.0, 3, 0.95),
        (torch.randn, 0.0, 5, 0.95),
        # skewed values, exponential here, are covered less often, as the docstring says
        (lambda *size, generator: -torch.rand(*size, generator=generator).log(), 1.0, 5, 0.88),
    ],
)
def test_intervals_cover_as_often_as_they_say(
    draw: Callable[..., torch.Tensor], mean_of_all: float, count: int, covered: float
) -> None:
    samples = draw(4000, count, generator=torch.Generator().manual_seed(0)).double().tolist()
    found = [estimate(sample) for sample in samples]
    share = sum(low <= mean_of_all <= high for _, low, high, _ in found) / len(found)
    assert share == pytest.approx(covered, abs=0.012)  # three standard errors


def test_nan_is_left_out_and_one_value_has_no_interval() -> None:
    assert estimate([0.0, math.nan, 1.0]) == estimate([0.0, 1.0])
    one = estimate([3.0, math.nan])
    assert one.mean == 3.0 and math.isnan(one.low) and math.isnan(one.high) and one.numbers == 1
    assert math.isnan(estimate([]).mean) and math.isnan(mean([math.nan]))


def test_differences_pair_by_seed() -> None:
    own, base = {1: 0.5, 2: 0.25, 3: math.nan, 4: 1.0}, {2: 0.5, 1: 0.25, 3: 0.0, 5: 0.0}
    assert differences(own, base) == {1: 0.25, 2: -0.25}


def test_late_mean_is_over_the_last_tenth_rounded_up() -> None:
    assert late_mean({step: float(step) for step in range(1, 101)}) == 95.5
    assert late_mean({2: 4.0, 1: 8.0}) == 4.0
    assert late_mean({step: float(step) for step in range(1, 12)}) == 10.5


def test_curves_cover_the_steps_of_all_seeds() -> None:
    curves = [{"a": {1: 1.0, 2: 2.0}}, {"a": {2: 4.0, 3: 5.0}}]
    assert gather(curves, "a") == {2: [2.0, 4.0]}
    assert gather(curves, "b") == {} and gather([], "a") == {}


def test_pass_at_k_is_the_largest_k() -> None:
    outcome = Outcome(2, {"test/pass@1": 0.1, "test/pass@8": 0.5, "test/pass@16": 0.7})
    assert metric(outcome, "test/pass@k") == 0.7
    assert math.isnan(metric(Outcome(2, {"test/pass@1": 0.1}), "test/pass@k"))
    assert math.isnan(metric(outcome, "test/invalid_fraction"))


def test_thinned_curve_keeps_both_ends_and_few_digits() -> None:
    assert thinned({step: step / 3 for step in range(0, 101)}) == {
        step: float(f"{step / 3:.4g}") for step in range(0, 101, 5)
    }
    assert list(thinned({step: 0.0 for step in range(3, 50)}))[-2:] == [48, 49]
    assert thinned({0: 0.5, 50: 0.25, 100: 1.0}) == {0: 0.5, 50: 0.25, 100: 1.0}


# ----- choice and report


def test_value_of_the_highest_complete_mean_is_chosen(plan_file: Callable[..., Path]) -> None:
    plan = read_plan(plan_file(sweep_seeds=[1, 3]))
    scores: dict[tuple[str, float], list[float | None]] = {
        ("clip", 0.2): [0.5, 0.5],
        ("clip", 0.4): [0.5, 0.5],  # equal: the first
        ("tre", 0.01): [0.1, 0.2],
        ("tre", 0.1): [0.9, None],  # not a number on one seed
    }
    for (name, value), finals in scores.items():
        for seed, final in zip([1, 3], finals, strict=True):
            made_up(plan, Trial(name, value, seed), final)
    assert choose(plan) == {"clip": 0.2, "tre": 0.01}
    (Trial("tre", 0.01, 3).directory(plan) / RESULT).unlink()
    assert choose(plan) == {"clip": 0.2}


def test_report_by_hand(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    plan = read_plan(plan_file(seeds=[5, 6]))
    for name, value, final in (("clip", 0.2, 0.3), ("clip", 0.4, 0.1), ("tre", 0.01, 0.2)):
        made_up(plan, Trial(name, value, 1), final, **{"pass@1": 0.25})
    made_up(plan, Trial("tre", 0.1, 1), 0.4, **{"pass@1": 0.75})
    for seed, clip, tre in ((5, 0.25, 0.5), (6, 0.5, 0.625)):
        made_up(plan, Trial("clip", 0.2, seed), 0.0, **{"pass@1": clip, "pass@2": 0.5})
        made_up(plan, Trial("tre", 0.1, seed), 0.0, **{"pass@1": tre, "pass@2": None})
    results = collect(plan, "plan.yaml")
    text = report(results)
    lines = text.splitlines()
    assert "    python -m tre_lightning.compare --config plan.yaml" in lines
    assert "| method | option | value | effective coef | seeds | pass@1 | pass@2 |" in lines
    # of two values, the standard error is half their distance, times 12.706
    clip = "0.375 (-1.213 to 1.963) | 0.500 (0.500 to 0.500)"
    assert f"| clip | model.ppo.clip_eps_high | 0.2 |  | 2 | {clip} |" in lines
    assert "| tre | coef | 0.1 | 0.5 | 2 | 0.562 (-0.232 to 1.357) |  |" in lines
    # t = .1875 / .0625 = 3, of one degree of freedom: p = 1 - 2 atan(3) / pi
    assert "| difference to clip | pass@1 | above | p | pass@2 | above | p |" in lines
    assert "| tre | +0.188 (-0.607 to +0.982) | 2 of 2 | 0.205 |  |  |  |" in lines
    assert "| tre | coef | 0.1 | 0.5 | 1 | 0.400 | 0.750 |  |" in lines  # the sweep
    assert not any("Unfinished" in line for line in lines)
    turned = paired_table(results, "tre", ["clip"]).splitlines()
    assert turned[0].startswith("| difference to tre |")
    assert turned[2].startswith("| clip | -0.188 (-0.982 to +0.607) | 0 of 2 | 0.205 |")
    assert seeds_table(results).splitlines()[2:] == [
        "| clip | 0.250 / 0.500 | 0.500 / 0.500 |",
        "| tre | 0.500 / 0.625 |  /  |",
    ]
    # the file has all of it
    write_results(tmp_path / "results.json", results)
    assert report(read_results(tmp_path / "results.json")) == text
    (Trial("tre", 0.1, 6).directory(plan) / RESULT).unlink()
    assert "**Unfinished: 3 of 4 trials.**" in report(collect(plan, "plan.yaml"))


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_plans_give_configurations_that_parse(file: Path, shown: runs.Said) -> None:
    plan = read_plan(file)
    for name, method in plan.methods.items():
        value = method.settings[-1]
        made = specification(plan, Trial(name, value, plan.seeds[0]), file.parent)
        words = [f"--config={config}" for config in made["configs"]] + made["flags"]
        printed = shown(fit, ["fit", *words, "--print_config"])
        if value is not None:
            assert f": {value}" in printed, name
