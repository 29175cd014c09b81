"""GSM8K, and where a response gives its answer: in a box, behind ####, or as its last number."""

import logging
from pathlib import Path
from typing import Any

import pytest

import batches
from chat_tokenizers import smol
from runs import write_jsonl
from tre_lightning.tasks import GSM8KDataModule, MathDataModule
from tre_lightning.tasks.mathematics.prompts import INSTRUCTIONS, AnswerIn, is_decimal

pytest.importorskip("math_verify")

ROWS = [
    {"question": "What is 6 * 7?", "answer": "6 * 7 = <<6*7=42>>42 cents.\n#### 42"},
    {"question": "What is 600 * 7?", "answer": "It is <<600*7=4200>>4200.\n#### 4,200"},
]
HELD_OUT = [{"question": "What is 2 - 5?", "answer": "2 - 5 = -3\n#### -3"}]


def gsm8k(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> GSM8KDataModule:
    return GSM8KDataModule(
        train_file=write_jsonl(tmp_path / "train.jsonl", rows),
        eval_file=write_jsonl(tmp_path / "eval.jsonl", HELD_OUT),
        **options,
    )


@pytest.mark.parametrize(
    ("answer_in", "response", "gold", "score"),
    [
        ("number", "So 42 cents are left.", "42", 1),
        ("number", "6 * 7 = 42", "42", 1),
        ("number", "The answer is $4,200.00.", "4200", 1),
        ("number", r"\boxed{42}", "42", 1),
        ("number", "#### 42", "42", 1),
        ("number", "it is 0.5", r"\frac{1}{2}", 1),
        ("number", "it is 50", r"50\%", 1),
        ("number", "42 or 43", "42", 0),
        ("number", "6 * 7", "7", 0),
        ("number", "84/2", "2", 0),
        ("number", "forty-two", "42", 0),
        ("number", "42\uff18", "42", 0),
        ("number", " ".join(map(str, range(100))), "42", 0),
        ("hash", "6 * 7 = 42\n#### 42", "42", 1),
        ("hash", "#### 41\n#### 42", "42", 1),
        ("hash", "####42\nThat is all, in 3 lines.", "42", 1),
        ("hash", "#### $4,200", "4200", 1),
        ("hash", r"#### \frac{2}{4}", r"\frac{1}{2}", 1),
        ("hash", "#### 42\n#### 41", "42", 0),
        ("hash", "#### 41 or 42", "42", 0),
        ("hash", "#### 6 * 7", "42", 0),
        ("hash", "### 42", "42", 0),
        ("hash", "42", "42", 0),
        ("hash", "#### ", "42", 0),
        ("box", r"so \boxed{42}", "42", 1),
        ("box", "#### 42", "42", 0),
        ("box", "42", "42", 0),
    ],
)
def test_the_answer_is_where_the_option_says(
    answer_in: AnswerIn, response: str, gold: str, score: float
) -> None:
    data = MathDataModule(answer_in=answer_in, workers=1)
    try:
        prompts = batches.prompt_batch({"gold": gold})
        assert data.score([response], prompts).tolist() == [score]
        (answer,) = data.answers([response], prompts)
        assert answer is not None or score == 0
    finally:
        data.teardown()


def test_answers_that_agree_are_the_same() -> None:
    prompts = batches.prompt_batch({"gold": "1"})
    for answer_in, same in {
        "number": ["a 0.50", "1 or .5", "0.5"],
        "hash": ["#### 1/2", "#### 0.5", r"#### \frac12"],
        "box": [r"\boxed{0.5}", r"\boxed{1/2}"],
    }.items():
        found = MathDataModule(answer_in=answer_in).answers(same, prompts)  # type: ignore[arg-type]
        assert len({*found}) == 1 and found[0] is not None


def test_rows_of_gsm8k(tmp_path: Path) -> None:
    data = gsm8k(tmp_path)
    data.check(smol())
    prompts = sorted((data.train_prompt(i) for i in range(2)), key=lambda p: len(p.text))
    assert [p.extra["gold"] for p in prompts] == ["42", "4200"]
    assert prompts[0].text == f"What is 6 * 7? {INSTRUCTIONS['number']}"
    assert [p.extra["gold"] for p in data.heldout_prompts("test")["test"]] == ["-3"]
    assert data.score(["2 - 5 = -3"], batches.prompt_batch({"gold": "-3"})).tolist() == [1.0]
    shown = {data.demonstration(i, False)[1] for i in range(2)}
    assert shown == {"6 * 7 = 42 cents.\nThe answer is 42.", "It is 4200.\nThe answer is 4200."}


def test_the_hub_name_is_the_default() -> None:
    data = GSM8KDataModule()
    assert data.files["train_file"] == ("openai/gsm8k", "train", "main")
    assert data.files["eval_file"] == ("openai/gsm8k", "test", "main")
    assert data.answer_in == "number" != MathDataModule().answer_in == "box"


@pytest.mark.parametrize(("answer_in", "counted"), [("number", 3), ("box", 1), ("hash", 1)])
def test_golds_that_cannot_be_graded_are_counted(
    answer_in: AnswerIn, counted: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS, *({"question": g, "answer": f"#### {g}"} for g in ("1/3", "x + 1", r"\odd{1"))]
    with caplog.at_level(logging.WARNING):
        gsm8k(tmp_path, rows, answer_in=answer_in, instruction="").check(smol())
    (said,) = (r.getMessage() for r in caplog.records if "hardly be scored" in r.getMessage())
    assert said.startswith(f"{counted} of 5 rows of data.train_file=")
    if answer_in == "number":
        assert "train.jsonl:3: the answer '1/3' is no decimal number, which data.answer_in" in said


@pytest.mark.parametrize(
    ("golds", "decimal"),
    [
        (["42", "-3.5", r"\frac{3}{8}", r"12\%", "$1,234$"], True),
        (["1/3", "x", "(1,2)", r"\sqrt{4}", ""], False),
    ],
)
def test_decimal_golds(golds: list[str], decimal: bool) -> None:
    assert [is_decimal(gold) for gold in golds] == [decimal] * 5


def test_another_word_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.answer_in=line must be one of the words box, hash"
    ):
        MathDataModule(answer_in="line")  # type: ignore[arg-type]


@pytest.mark.parametrize("answer_in", [*INSTRUCTIONS])
def test_generated_problems_are_answered_in_the_same_way(answer_in: AnswerIn) -> None:
    data = MathDataModule(answer_in=answer_in)
    vocabulary = {*data.vocabulary()}
    for index in range(20):
        prompt, response = data.demonstration(index, False)
        assert {*prompt.text.split(), *response.split()} <= vocabulary
        assert data.score([response], batches.prompt_batch(prompt.extra)).tolist() == [1.0]
