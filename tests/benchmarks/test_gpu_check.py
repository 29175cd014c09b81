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


def test_the_kernels_are_skipped_where_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.scan, "_has_triton", lambda device: False)
    with pytest.raises(gpu_check.Skipped, match="Triton"):
        gpu_check.run_tests(Namespace(device="cuda"))


def test_bad_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    for words in (["--device=cuda"], ["--minutes=0"]):
        with pytest.raises(SystemExit, match="2"):
            gpu_check.options_of(words)


def test_on_a_gpu_the_first_turn_is_left_out_and_memory_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, now, spent = gpu_check.torch.cuda, [0.0], iter([50.0, 1.0, 3.0, 2.0])

    def run() -> None:
        now[0] += next(spent)

    monkeypatch.setattr(gpu_check.entropy_op.time, "perf_counter", lambda: now[0])
    waits: list[float] = []
    monkeypatch.setattr(cuda, "synchronize", lambda: waits.append(now[0]))
    assert gpu_check.entropy_op.medians({"it": run}, 3, "cuda") == {"it": 2.0}
    assert waits == [0.0, 50.0, 50.0, 51.0, 51.0, 54.0, 54.0, 56.0]
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: 10 * 2**20)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 14 * 2**20)
    assert gpu_check.entropy_op.gpu_peaks({"it": lambda: None}) == {"it": 4.0}


def test_the_table_has_times_memory_and_who_was_missing() -> None:
    where: dict[str, Any] = {"N": 8192, "V": 151_936, "dtype": "bf16"}
    logits = {"units": {"ours full": 3.0, "published full": 9.0}, "read_ms": 2.0, "copy_ms": 2.0}
    logits |= {"copy_gb_s": 2490.0, "of the roofline": {"full": 0.5}}
    logits |= {"peak_mib": {"ours full": 1.0, "published full": 30_000.0}}
    linear = {"D": 4096, "of the head": {"head alone": 1.0, "fused": 1.5}, "head_s": 0.02}
    linear |= {"peak_mib": {"head alone": 0.0, "fused": 512.0}, "no Liger": "not installed"}
    results = {"logits": [where | logits], "linear": [where | linear]}
    first, second = "from logits, 8192 x 151,936 bf16", "from hidden states, 8192 x 4,096 x 151,936"
    assert list(gpu_check.op_rows(results)) == [
        (f"{first}: a copy", "2.00 ms, 2,490 GB/s"),
        (f"{first}: ours full", "6.00 ms, 1 MiB, 50% of the roofline"),
        (f"{first}: published full", "18.00 ms, 30,000 MiB"),
        (f"{second} bf16, full: head alone", "20.00 ms, 0 MiB"),
        (f"{second} bf16, full: fused", "30.00 ms, 512 MiB"),
        (f"{second} bf16, full: Liger", "not installed"),
    ]
