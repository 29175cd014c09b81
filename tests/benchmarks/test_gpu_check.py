"""Tests of benchmarks/gpu_check.py: all of it on the CPU, its judgement by hand, failing parts."""

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import gpu_check
import ppo_step
import pytest

import small_models

OP: dict[str, Any] = {
    "logits": [
        {
            "units": {"ours TRE-K": 2.2, "ours TRE-P": 2.0, "ours full": 2.0},
            "of the roofline": {"TRE-K": 0.7, "TRE-P": 0.75, "full": 0.8},
        },
        {
            "units": {"ours TRE-K": 3.0, "ours TRE-P": 3.36, "ours full": 3.0},
            "of the roofline": {"TRE-K": 0.9, "TRE-P": 0.65, "full": 0.7},
        },
    ],
    "linear": [
        {"of the head": {"fused": 1.2, "Liger": 1.2}, "no Liger": None},
        {"of the head": {"fused": 1.5, "Liger": 1.2}, "no Liger": None},
    ],
}
UPDATE: dict[str, Any] = {"no trl": None, "rows": [{"update, s": 2.0}, {"update, s": 3.2}]}


def judged(op: Any, update: Any, device: str = "cuda") -> list[Any]:
    parts = {
        name: {"status": "passed", "results": results}
        for name, results in {"op": op, "update": update}.items()
    }
    return gpu_check.aims(device, parts)


def test_all_of_it_at_small_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(options: Namespace, kind: str, who: str, model: str) -> Any:
        return ppo_step.run_ours(kind, ppo_step.setting_of(options), model, "cpu", iterations=2)

    monkeypatch.setattr(ppo_step, "run_apart", here)
    monkeypatch.setattr(ppo_step, "missing", lambda *args: "trl is not installed")
    monkeypatch.setattr(gpu_check.entropy_op, "has_trl", lambda: False)
    model, out = small_models.save(tmp_path / "model"), tmp_path / "out"
    words = ["--device=cpu", f"--out={out}", f"--model={model}"]
    assert gpu_check.main(words, gpu_check.run_part) == 0
    report = json.loads((out / "gpu_check.json").read_text())
    assert report.keys() == {"device", "machine", "parts", "aims"}
    parts = report["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        gpu_check.PARTS, "passed"
    )
    (logits,), (linear,) = (parts["op"]["results"][key] for key in ("logits", "linear"))
    assert (logits["N"], logits["V"], logits["dtype"]) == (32, 4096, "bf16")
    copies = 1.5 * logits["copy_ms"] / logits["read_ms"]
    assert logits["of the roofline"] == pytest.approx(
        {name: copies / logits["units"][f"ours {name}"] for name in ("TRE-K", "TRE-P", "full")}
    )
    assert linear["D"] == 64 and {"fused", "published"} < linear["of the head"].keys()
    assert [row["who"] for row in parts["update"]["results"]["rows"]] == ["ours"]
    assert parts["smollm2"]["results"]["iterations"] == 2
    assert parts["smollm2"]["results"]["peak_mib"] > 0
    assert {"rollout/seconds", "val/pass@1"} <= parts["smollm2"]["results"]["last"].keys()
    assert [aim["reached"] for aim in report["aims"]] == [None] * 4
    rows = [line for line in (out / "gpu_check.md").read_text().splitlines() if line[:1] == "|"]
    assert {row.count(" | ") for row in rows} == {2}
    assert {row.split(" | ")[0] for row in rows[2:]} == {f"| {name}" for name in gpu_check.PARTS}
    assert "not measured: time of trl's update, in ours: at least 1.5" in capsys.readouterr().out


def test_an_aim_is_judged_by_its_worst_case() -> None:
    assert [aim["line"] for aim in judged(OP, UPDATE)] == [
        "reached: time of the full entropy, in Liger's: at most 1.3, measured 1.25",
        "reached: time of TRE, in our full entropy's: at most 1.15, measured 1.12",
        "reached: the op's share of the memory roofline: at least 0.6, measured 0.65",
        "reached: time of trl's update, in ours: at least 1.5, measured 1.60",
    ]
    op, update = copy.deepcopy(OP), copy.deepcopy(UPDATE)
    op["linear"][0]["of the head"]["fused"] = 1.68
    op["logits"][0]["units"]["ours TRE-P"] = 2.4
    op["logits"][1]["of the roofline"]["full"] = 0.5
    update["rows"][1]["update, s"] = 2.8
    worse = judged(op, update)
    assert [aim["value"] for aim in worse] == pytest.approx([1.4, 1.2, 0.5, 1.4])
    assert [aim["reached"] for aim in worse] == [False] * 4
    assert worse[2]["line"] == (
        "missed: the op's share of the memory roofline: at least 0.6, measured 0.50"
    )


def test_what_was_not_measured_is_not_judged() -> None:
    op, update = copy.deepcopy(OP), {"no trl": "trl is not installed", "rows": [{"update, s": 2.0}]}
    op["linear"][1]["no Liger"] = "liger-kernel is not installed"
    found = judged(op, update)
    assert [aim["reached"] for aim in found] == [None, True, True, None]
    assert found[0]["line"].endswith("at most 1.3 (liger-kernel is not installed)")
    assert {aim["reached"] for aim in judged(OP, UPDATE, "cpu")} == {None}
    failed = {"status": "failed", "reason": "out of memory"}
    lines = [aim["line"] for aim in gpu_check.aims("cuda", {"op": failed})]
    assert lines[0].endswith("(out of memory)") and lines[3].endswith("(the part has not run)")


def test_a_part_that_fails_or_cannot_run_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: Namespace) -> Any:
        raise ValueError("no such kernel")

    def cannot(options: Namespace) -> Any:
        raise gpu_check.Skipped("they need Triton")

    parts = {"tests": cannot, "op": fails, "update": lambda options: {**UPDATE, "rows": []}}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setitem(gpu_check.ROWS, "update", lambda results: iter([("one", "row")]))
    words = ["--device=cpu", f"--out={tmp_path}"]
    assert gpu_check.main(words, gpu_check.run_part) == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [part["status"] for part in found.values()] == ["skipped", "failed", "passed"]
    assert found["op"]["reason"] == "ValueError: no such kernel"
    written = (tmp_path / "gpu_check.md").read_text()
    assert "s: ValueError: no such kernel |" in written and "| update | one | row |" in written
    assert "tests    skipped in 0 s: they need Triton" in capsys.readouterr().out


def test_a_part_ends_with_its_time(tmp_path: Path) -> None:
    options = gpu_check.options_of(["--device=cpu", f"--out={tmp_path}"])
    outcome = gpu_check.run_apart("op", options, limit=0.01)
    assert outcome["status"] == "failed" and "longer than its 0 s" in outcome["reason"]


def test_smollm2_is_that_of_the_directory_or_of_its_package_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, made = tmp_path / "none", tmp_path / "made"
    assert gpu_check.smollm2(tmp_path, made) == tmp_path
    with pytest.raises(gpu_check.Skipped, match="python -m tre_lightning model smollm2"):
        gpu_check.smollm2(none, made)
    package, file = gpu_check.PACKAGED["smollm2"].file.split("/")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    small_models.write_gguf(tmp_path / package / file)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gpu_check.smollm2(none, made) == made and (made / "config.json").exists()
    assert not none.exists()


def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    for words in (["--device=cuda"], ["--minutes=0"]):
        with pytest.raises(SystemExit, match="2"):
            gpu_check.options_of(words)
