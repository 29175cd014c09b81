"""Rows of files and of the hub: names of files, numbers, configurations, golds without a reader."""

import json
import logging
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import write_jsonl
from tre_lightning.tasks import CountdownDataModule, MathDataModule
from tre_lightning.tasks.alignment.pairs import load_pairs
from tre_lightning.tasks.alignment.prompts import PreferenceDataModule, RewardArgs
from tre_lightning.tasks.countdown.puzzles import read_puzzle
from tre_lightning.tasks.mathematics.prompts import read_problem
from tre_lightning.tasks.mathematics.scorer import score_math
from tre_lightning.tasks.sources import number_text, read_rows

ODD_NAMES = ["br[1]", "a*b?", "with space", "50%41", "~", "#1", "a::b", "{x}", "README.md", ".x"]


def write_parquet(file: Path, columns: dict[str, Any], types: dict[str, str] | None = None) -> str:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = {name: getattr(pa, kind)() for name, kind in (types or {}).items()}
    arrays = {name: pa.array(values, kinds.get(name)) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), file)
    return str(file)


def gold(row: Mapping[str, Any]) -> str:
    (found,) = read_problem({"problem": "p", **row}, "here")[1]
    return found


# ----- names of files


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_of_a_file_is_a_name_and_no_pattern(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"nums": [1, 2], "target": 3}
    for decoy in ("br1", "ab", "acbd"):  # what a pattern would find
        write_parquet(tmp_path / f"{decoy}.parquet", {"nums": [[9, 9]], "target": [9]})
    jsonl = write_jsonl(tmp_path / f"{name}.jsonl", [row])
    parquet = write_parquet(
        tmp_path / f"{name}.parquet", {"nums": [row["nums"]], "target": [row["target"]]}
    )
    assert list(read_rows("x", jsonl)) == [(f"{jsonl}:1", row)]
    assert list(read_rows("x", parquet)) == [(f"{parquet}: row 0", row)]
    assert [found for _, found in read_rows("x", f"{name}.parquet")] == [row]  # relative


def test_the_home_directory_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    write_parquet(tmp_path / "a.parquet", {"x": [1]})
    for kind in ("jsonl", "parquet"):
        assert [row for _, row in read_rows("x", f"~/a.{kind}")] == [{"x": 1}]
    with pytest.raises(ValueError, match=r"x=~nobody_here/a.jsonl cannot be read"):
        list(read_rows("x", "~nobody_here/a.jsonl"))


def test_a_file_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    for content in (b"", b"no parquet at all", b"PAR1" * 9):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"data.x_file=.*a.parquet could not be loaded"):
            list(read_rows("data.x_file", str(file)))


# ----- configurations of the hub


def test_a_dataset_of_several_configurations_has_an_option_for_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, options.get("name")))
        if path == "several" and "name" not in options:
            raise ValueError("Config name is missing. Please pick one among: main, socratic")
        if path.startswith("pairs"):
            return [{"prompt": f"{path} {i}", "chosen": "a", "rejected": "b"} for i in range(9)]
        numbered = {"nums": [1, len(path)], "target": 3}
        return [{"problem": path, "answer": "1", "prompt": path, **numbered}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    files = {"train_file": "several", "train_name": "main", "eval_file": "b", "eval_name": "c"}
    math = MathDataModule(**files, test_file="d", test_name="e")  # type: ignore[arg-type]
    math.train_prompt(0)
    assert sorted(asked) == [("b", "c"), ("d", "e"), ("several", "main")]
    asked.clear()
    CountdownDataModule(**files).train_prompt(0)  # type: ignore[arg-type]
    assert sorted(asked) == [("b", "c"), ("several", "main")]
    asked.clear()
    names = {"train_name": "f", "eval_name": "g", "exclude_name": "h"}
    sources = {"train_file": "pairs1", "eval_file": "pairs2", "exclude_file": "pairs3"}
    sizes = {"val_size": 1, "test_size": 1}
    server = RewardArgs(url="http://127.0.0.1:9")
    task = PreferenceDataModule(server, **sources, **names, **sizes)  # type: ignore[arg-type]
    task._read_files()
    assert sorted(asked) == [("pairs1", "f"), ("pairs2", "g"), ("pairs3", "h")]
    asked.clear()
    load_pairs("pairs4", "train", "i")
    assert asked == [("pairs4", "i")]
    with pytest.raises(ValueError, match=r"data.train_name where it has several .*Config name"):
        MathDataModule(train_file="several", eval_file="b").train_prompt(0)
    with pytest.raises(ValueError, match=r"data.source=several .* data.name where"):
        load_pairs("several")


# ----- numbers as golds


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("0.00005", "0.00005"),
        ("5e-05", "0.00005"),
        ("5E-7", "0.0000005"),
        ("1e22", "10000000000000000000000"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("3.14159265358979323846264338327950288", "3.14159265358979323846264338327950288"),
        ("-5", "-5"),
        ("-2.50", "-2.50"),
        ("18.0", "18.0"),
        ("1e3", "1000"),
        ("0", "0"),
        ("0.1", "0.1"),
        ('"5e-05"', "0.00005"),  # a float that was turned into text on the way
        ('"1e+22"', "10000000000000000000000"),
        ('"3e-2"', "3e-2"),  # may well be three times e minus 2
        ('"x"', "x"),
    ],
)
def test_a_number_is_the_gold_that_its_digits_say(literal: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"answer": {literal}}}\n')
    ((_, row),) = read_rows("x", str(file), decimals=True)
    assert gold(row) == text


@pytest.mark.parametrize(
    ("literal", "box"),
    [
        ("0.00005", "0.00005"),
        ("5e-05", r"5 \times 10^{-5}"),
        ("1e22", "10^{22}"),
        ("18.0", "18"),
        ("1234567.0", "1,234,567"),
        ("-2.50", r"-\frac{5}{2}"),
    ],
)
def test_the_value_of_a_number_scores_one(literal: str, box: str) -> None:
    number = json.loads(literal, parse_float=Decimal)
    assert score_math(f"\\boxed{{{box}}}", gold({"answer": number})) == 1.0
    assert score_math(f"\\boxed{{{box}}}", gold({"answer": float(literal)})) == 1.0
    assert score_math("\\boxed{7}", gold({"answer": number})) == 0.0


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("float64", 5e-05, "0.00005"),
        ("float64", 1e22, "10000000000000000000000"),
        ("float32", 0.1, "0.1"),
        ("float32", 5e-05, "0.00005"),
        ("float16", np.float16(0.1), "0.1"),
        ("int64", -7, "-7"),
        ("uint64", 2**64 - 1, "18446744073709551615"),
        ("string", r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_numbers_of_a_table_are_golds(kind: str, value: Any, text: str, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"answer": [value]}, {"answer": kind})
    ((_, row),) = read_rows("x", file, decimals=True)
    assert gold(row) == text
    assert [found for _, found in read_rows("x", file)] == [{"answer": value}] or kind == "float32"


def test_decimals_of_a_table_are_golds(tmp_path: Path) -> None:
    values = [Decimal("0.00005"), Decimal("12.50000"), None]
    file = write_parquet(tmp_path / "a.parquet", {"answer": values})
    for decimals in (False, True):
        rows = read_rows("x", file, decimals=decimals)
        assert [row["answer"] for _, row in rows] == values
    assert gold({"answer": values[0]}) == "0.00005"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(0.1), "0.1"),
        (np.float64(5e-05), "0.00005"),
        (np.int64(-3), "-3"),
        (np.uint8(255), "255"),
        (Fraction(1, 3), "1/3"),
        (Decimal("1E+3"), "1000"),
        (10**5, "100000"),
        (True, None),
        (np.bool_(True), None),
        (float("inf"), None),
        (float("nan"), None),
        ("5", None),
        (None, None),
        (1j, None),
        ([1], None),
    ],
)
def test_numbers_of_every_kind_in_digits(value: object, text: str | None) -> None:
    assert number_text(value) == text


def test_a_number_too_large_for_digits_stays_short() -> None:
    assert number_text(Decimal("1e999999")) == "1E+999999"
    assert len(str(number_text(Decimal("1e-1000000")))) < 20


@pytest.mark.parametrize("value", [True, False, float("inf"), [1], {"a": 1}])
def test_a_gold_that_is_neither_text_nor_a_number_is_one_line(value: object) -> None:
    with pytest.raises(ValueError, match=r"^here: answer=.* is neither text nor a finite number"):
        gold({"answer": value})


# ----- golds that no response can match


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("He buys 9 * 2 = <<9*2=18>>18 eggs.\n#### 18", "18"),
        ("So it is\n#### 1,234,567", "1234567"),
        ("#### -1,234.5", "-1234.5"),
        ("####18 ", "18"),
        ("#### (1,234)", "(1,234)"),  # a point, not a number
        (r"#### \frac{1}{2}", r"\frac{1}{2}"),
        (r"Hence $\boxed{7}$.", "7"),
    ],
)
def test_the_form_of_gsm8k_is_read(answer: str, text: str, tmp_path: Path) -> None:
    assert gold({"answer": answer}) == text
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": answer}])
    other = write_jsonl(tmp_path / "b.jsonl", [{"question": "r", "answer": answer}])
    prompt = MathDataModule(train_file=file, eval_file=other).train_prompt(0)
    assert prompt.text.startswith("q ") and prompt.extra["gold"] == text
    assert prompt.where == f"{file}:1"


@pytest.mark.parametrize(
    "answer",
    ["The answer is 18.", "18 because 9 * 2 = 18, and \\", "(((", "9" * 2000, "<b>18</b>!"],
)
def test_golds_that_the_scorer_cannot_read_are_counted(
    answer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [{"problem": f"p{i}", "answer": i} for i in range(3)]
    bad = [{"problem": f"q{i}", "answer": answer} for i in range(2)]
    train = write_jsonl(tmp_path / "a.jsonl", [*good, *bad])
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"problem": "r", "answer": "1"}])
    MathDataModule(train_file=train, eval_file=held_out).train_prompt(0)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    said = record.getMessage()
    assert said.startswith(f"2 of 5 rows of data.train_file={train} can hardly be scored")
    assert f"{train}:4: the answer {answer[-80:]!r} is not read as mathematics" in said


def test_targets_that_no_step_can_reach_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"nums": [10**5, 10**5], "target": target} for target in (7, 10**10)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    CountdownDataModule(train_file=file).train_prompt(0)
    assert not caplog.records  # an expression can
    CountdownDataModule(train_file=file, format="steps").train_prompt(0)
    assert "1 of 2 rows" in caplog.text and f"{file}:2: target=10000000000" in caplog.text


def test_empty_messages_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": text} for text in ("a", "b", "c", " ")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    server = RewardArgs(url="http://127.0.0.1:9")
    PreferenceDataModule(server, train_file=file, val_size=1, test_size=1)._read_files()
    assert "1 of 4 rows" in caplog.text and f"{file}:4: the last message is empty" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        {"nums": [3.0, 4], "target": 7},
        {"nums": [3.5, 4], "target": 7},
        {"nums": ["3", 4], "target": 7},
        {"nums": "34", "target": 7},
        {"nums": {3: 4}, "target": 7},
        {"nums": None, "target": 7},
        {"nums": [True, 4], "target": 7},
        {"nums": [3, 4], "target": 7.0},
        {"nums": [3, 4], "target": 7.5},
        {"nums": [3, 4], "target": float("nan")},
        {"nums": [3, 4], "target": float("inf")},
    ],
)
def test_other_puzzles_are_refused_with_their_row(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^here: "):
        read_puzzle(row, "here")
