"""Countdown puzzles of files and datasets: which rows are trained on, and which are held out."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from runs import write_jsonl
from tre_lightning.policy.tokenizers import word_tokenizer
from tre_lightning.tasks import CountdownDataModule, Prompt, PuzzleSpec
from tre_lightning.tasks.sources import read_rows


def rows(*targets: int) -> list[dict[str, Any]]:
    """A row for each target, whose numbers tell it apart."""
    return [{"nums": [target, 100, 2], "target": target} for target in targets]


def targets(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.extra["target"] for prompt in prompts]


def trained(data: CountdownDataModule, count: int) -> list[int]:
    return targets([data.train_prompt(index) for index in range(count)])


def test_the_first_rows_train_and_the_next_test(tmp_path: Path) -> None:
    """Test after train, validation after test, the rest not at all: in the order of the file."""
    data = CountdownDataModule(
        train_file=write_jsonl(tmp_path / "a.jsonl", rows(*range(1, 11))),
        train_size=4,
        test_size=3,
        val_size=2,
    )
    passes = trained(data, 8)
    assert sorted(passes[:4]) == sorted(passes[4:]) == [1, 2, 3, 4]  # every one once a pass
    assert {name: targets(p) for name, p in data.heldout_prompts("test").items()} == {
        "test": [5, 6, 7]
    }
    assert {name: targets(p) for name, p in data.heldout_prompts("val").items()} == {"val": [8, 9]}


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """Half a million rows are not gone through for the first few thousand."""
    file = tmp_path / "a.jsonl"
    write_jsonl(file, rows(1, 2, 3))
    file.write_text(file.read_text() + "no JSON\n")
    data = CountdownDataModule(train_file=str(file), train_size=1, test_size=1, val_size=1)
    assert trained(data, 1) == [1]


def test_what_is_held_out_is_not_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same numbers in another order are the same puzzle; val holds none of test."""
    swapped = [{"nums": [2, 100, target], "target": target} for target in (5, 6, 9)]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows(1, 2), *swapped, *rows(5, 6, 7, 5)])
    held_out = write_jsonl(tmp_path / "b.jsonl", rows(9))
    with caplog.at_level(logging.WARNING):
        data = CountdownDataModule(
            train_file=file, eval_file=held_out, train_size=5, test_size=2, val_size=2
        )
        assert sorted(trained(data, 2)) == [1, 2]
    assert targets(data.heldout_prompts("val")["val"]) == [7]
    assert targets(data.heldout_prompts("val")["val_file"]) == [9]
    assert targets(data.heldout_prompts("test")["test"]) == [5, 6]
    assert f"left out 3 of 5 puzzles of data.train_file={file}" in caplog.text


def test_generated_puzzles_are_none_of_the_held_out_ones(tmp_path: Path) -> None:
    """A warm start on generated puzzles must not see the rows that are tested with."""
    spec = PuzzleSpec(count=(2, 2), number_range=(1, 3), target_range=(1, 9), operations="+*")
    tested = [{"nums": [1, 1], "target": 2}, {"nums": [2, 1], "target": 3}]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows(9), *tested, *rows(8)])
    data = CountdownDataModule(
        puzzles=spec, instruct=False, train_file=file, train_size=1, test_size=2, val_size=1
    )
    shown = {data.demonstration(index, False)[0].text for index in range(60)}
    assert shown and not shown & {"1 1 = 2 :", "2 1 = 3 :", "1 2 = 3 :"}
    without = CountdownDataModule(puzzles=spec, instruct=False)
    seen = {without.demonstration(index, False)[0].text for index in range(60)}
    assert seen & {"1 1 = 2 :", "2 1 = 3 :", "1 2 = 3 :"}  # they would come up


def test_a_whole_file_trains_where_no_size_is_given(tmp_path: Path) -> None:
    """As before there were sizes: held-out puzzles are generated ones."""
    data = CountdownDataModule(
        train_file=write_jsonl(tmp_path / "a.jsonl", rows(1, 2, 3)), test_size=4, val_size=5
    )
    assert sorted(trained(data, 3)) == [1, 2, 3]
    assert len(data.heldout_prompts("test")["test"]) == 4
    assert len(data.heldout_prompts("val")["val"]) == 5


def test_parquet_and_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = str(tmp_path / "a.parquet")
    columns = {"target": [1, 2, 3], "nums": [[1, 100, 2], [2, 100, 2], [3, 100, 2]]}
    datasets.Dataset.from_dict(columns).to_parquet(file)
    assert [row for _, row in read_rows("x", file)] == rows(1, 2, 3)
    data = CountdownDataModule(train_file=file, train_size=1, test_size=1, val_size=1)
    assert trained(data, 1) == [1] and targets(data.heldout_prompts("test")["test"]) == [2]

    asked = []

    def load(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return rows(4, 5, 6) if split == "train" else rows(7)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = CountdownDataModule(
        train_file="some/puzzles",
        eval_file="other/v1.5",
        eval_split="held_out",
        train_size=1,
        test_size=1,
        val_size=1,
    )
    assert not asked  # building it reads nothing
    assert trained(data, 1) == [4]
    assert targets(data.heldout_prompts("val")["val_file"]) == [7]
    assert sorted(asked) == [("other/v1.5", "held_out"), ("some/puzzles", "train")]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (rows(1, 2, 3), {"train_size": 2}, "holds 3 puzzles, fewer than data.train_size=2"),
        ([], {}, "holds no puzzle; add rows"),
        ([*rows(1), {"nums": 3, "target": 3}], {}, r"a\.jsonl:2: nums=3 is not a list"),
        (rows(1, 1, 2), {"train_size": 1, "test_size": 1}, "holds no puzzle that is not held out"),
    ],
)
def test_refused(
    tmp_path: Path, content: list[dict[str, Any]], options: dict[str, int], message: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", content)
    data = CountdownDataModule(train_file=file, **{"val_size": 1, "test_size": 1, **options})
    with pytest.raises(ValueError, match=message) as error:
        data.train_prompt(0)
    assert "\n" not in str(error.value)


def test_long_prompts_of_files_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt is its numbers, a sign, the target and a colon: here 5 or 6 words."""
    long = [{"nums": [1, 2, target, 4], "target": target} for target in (11, 12, 13)]
    eval_file = write_jsonl(tmp_path / "b.jsonl", [*rows(9), long[2]])
    words = ["=", ":", *map(str, range(101))]
    tokenizer = word_tokenizer(words, AutoConfig.for_model("llama", vocab_size=128))

    def data(*held_out: dict[str, Any]) -> CountdownDataModule:
        return CountdownDataModule(
            train_file=write_jsonl(tmp_path / "a.jsonl", [*rows(1, 2), long[0], *held_out]),
            eval_file=eval_file,
            train_size=3,
            test_size=1,
            val_size=1,
            instruct=False,
            long_prompts="drop",
            max_prompt_length=6,
        )

    with pytest.raises(ValueError, match=r"too short for all 1 prompts of data.train_file \(val\)"):
        data(*rows(5), long[1]).check(tokenizer)
    caplog.clear()
    kept = data(*rows(5, 6))
    kept.check(tokenizer)
    assert "left out 1 of 3 prompts of data.train_file longer than" in caplog.text
    assert "left out 1 of 2 prompts of data.eval_file longer than" in caplog.text
    assert sorted(trained(kept, 2)) == [1, 2]
    assert targets(kept.heldout_prompts("val")["val_file"]) == [9]
