"""The MATH task: generated arithmetic, files and datasets, scores, and a whole run."""

import copy
import importlib
import json
import os
import random
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

import batches
import runs
from runs import write_jsonl
from tre_lightning.batches import PromptBatch
from tre_lightning.common.errors import Refused
from tre_lightning.policy.tokenizers import word_tokenizer
from tre_lightning.tasks import ArithmeticSpec, CountdownDataModule, MathDataModule
from tre_lightning.tasks.mathematics.arithmetic import Problem, generate, mistaken, split_of, worked
from tre_lightning.tasks.mathematics.scorer import boxed_answers, last_boxed
from tre_lightning.tasks.sources import read_rows

pytest.importorskip("math_verify")

SPEC = ArithmeticSpec()
SUMS = Problem((5, 7, 8), "+*")


def texts(prompts: Sequence[Any]) -> list[str]:
    return [prompt.text for prompt in prompts]


def batch(golds: Sequence[str]) -> PromptBatch:
    return batches.prompt_batch(*({"gold": gold} for gold in golds))


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    """A tokenizer of single letters."""
    config = AutoConfig.for_model(**{**runs.ARCHITECTURE, "vocab_size": 29})
    return word_tokenizer([chr(ord("a") + i) for i in range(26)], config)


# ----- arithmetic


@pytest.mark.parametrize(
    ("problem", "text", "response"),
    [
        (Problem((7, 8, 5), "*+"), "7 * 8 + 5 =", r"7 * 8 = 56 , 56 + 5 = 61 , \boxed{ 61 }"),
        (SUMS, "5 + 7 * 8 =", r"7 * 8 = 56 , 5 + 56 = 61 , \boxed{ 61 }"),
        (Problem((9, 3, 2), "--"), "9 - 3 - 2 =", r"9 - 3 = 6 , 6 - 2 = 4 , \boxed{ 4 }"),
        (
            Problem((2, 3, 4, 5), "*+*"),
            "2 * 3 + 4 * 5 =",
            r"2 * 3 = 6 , 4 * 5 = 20 , 6 + 20 = 26 , \boxed{ 26 }",
        ),
    ],
)
def test_products_come_first_then_left_to_right(problem: Problem, text: str, response: str) -> None:
    work = worked(problem, SPEC)
    assert problem.text == text and work is not None and work.text == response


def test_a_result_out_of_range_is_no_work() -> None:
    assert worked(Problem((1, 2, 3), "-+"), SPEC) is None  # -1
    assert worked(Problem((12, 12, 1), "*-"), SPEC) is None  # 144
    assert worked(Problem((10, 10, 0), "*+"), SPEC) is not None  # 100
    assert worked(Problem((3, 3, 0), "-+"), SPEC) is not None  # 0


def test_a_mistake_is_sound_but_ends_elsewhere() -> None:
    rng = random.Random(0)
    assert mistaken(SUMS, SPEC, rng).text == r"5 + 7 = 12 , 12 * 8 = 96 , \boxed{ 96 }"
    assert mistaken(Problem((9, 3, 2), "--"), SPEC, rng).text.endswith(r"9 - 1 = 8 , \boxed{ 8 }")
    with pytest.raises(ValueError, match=r"no order of steps misses .*1 \+ 2 \+ 3 ="):
        mistaken(Problem((1, 2, 3), "++"), SPEC, rng)


def test_the_splits_share_no_problem_in_any_order_of_its_numbers() -> None:
    keys = {
        split: {
            (*sorted(p.numbers), *sorted(p.operators))
            for p in (generate(SPEC, split, index, 1) for index in range(300))
        }
        for split in ("train", "val", "test")
    }
    assert all(len(found) > 40 for found in keys.values())
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]
    assert split_of(Problem((7, 8, 5), "*+")) == split_of(SUMS)


def test_problems_depend_on_seed_and_index_alone() -> None:
    first = [generate(SPEC, "train", index, 1) for index in range(20)]
    assert first[::-1] == [generate(SPEC, "train", index, 1) for index in reversed(range(20))]
    assert len(set(first)) > 15
    assert first != [generate(SPEC, "train", index, 2) for index in range(20)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": (2, 3)}, r"count=\(2, 3\)"),
        ({"number_range": (1, 101)}, r"number_range=\(1, 101\)"),
        ({"number_range": (9, 1)}, r"number_range=\(9, 1\)"),
        ({"operations": "+"}, r"operations='\+'"),
        ({"operations": "+/"}, r"operations='\+/'"),
        ({"max_value": 0}, "max_value=0"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ArithmeticSpec(**options)


def test_the_tokenizer_of_words_keeps_demonstrations_readable() -> None:
    data = MathDataModule(instruction="Box it :")
    tokenizer = word_tokenizer(
        data.vocabulary(), AutoConfig.for_model(**{**runs.ARCHITECTURE, "vocab_size": 128})
    )
    right, wrong = [], []
    for index in range(100):
        for misleading, responses in ((False, right), (True, wrong)):
            prompt, response = data.demonstration(index, misleading)
            assert prompt == data.train_prompt(index) and prompt.text.endswith("= Box it :")
            ids = tokenizer(f"{prompt.text} {response}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            ids = tokenizer(response)["input_ids"]
            responses.append(tokenizer.batch_decode([ids], skip_special_tokens=True)[0])
    golds = [data.train_prompt(index).extra["gold"] for index in range(100)]
    assert [str(last_boxed(response)).strip() for response in right] == golds
    assert data.score(right, batch(golds)).eq(1.0).all()
    assert data.score(wrong, batch(golds)).eq(0.0).all()
    assert data.scorer_timeouts() == 0


def test_heldout_problems_are_different_and_as_many_as_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = MathDataModule(val_size=40, test_size=60)
    val, test = data.heldout_prompts("val")["val"], data.heldout_prompts("test")["test"]
    assert len(set(texts(val))) == 40 and len(set(texts(test))) == 60
    monkeypatch.setattr("tre_lightning.tasks.mathematics.prompts._DRAWS_A_PROBLEM", 1)
    with pytest.raises(ValueError, match=r"data\.val_size=300, but .* different val problems"):
        MathDataModule(val_size=300).heldout_prompts("val")  # some of 300 draws are the same


# ----- files


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (r"so \boxed{3} or \fbox{4}", ["3", "4"]),
        (r"\boxed{\boxed{5}+1} \boxed{6}", [r"\boxed{5}+1", "6"]),
        (r"\boxed{a{b}} \boxed{open", ["a{b}"]),
        (r"\\boxed{1} none", []),
    ],
)
def test_boxes_from_the_outside(text: str, answers: list[str]) -> None:
    assert boxed_answers(text) == answers


def test_golds_and_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = [
        {"problem": "one", "answer": r"\frac12", "solution": r"\boxed{9}"},
        {"problem": "two", "answer": 2},
        {"problem": "three", "solution": r"as \boxed{ 3 } is \boxed{3}"},
        {"problem": "four", "solution": r"either \boxed{4} or \boxed{5}"},
        {"problem": "five", "solution": "no box"},
        {"problem": "six", "answer": None},
        {"problem": "seven", "answer": None, "solution": r"\boxed{7}"},
        {"problem": " ei\nght ", "answer": "8"},
        {"problem": "nine", "answer": "9"},
    ]
    data = MathDataModule(
        train_file=write_jsonl(tmp_path / "train.jsonl", train),
        eval_file=write_jsonl(tmp_path / "eval.jsonl", [{"problem": "ei ght", "answer": "8"}]),
        test_file=write_jsonl(tmp_path / "test.jsonl", [{"problem": "nine", "answer": "9"}]),
        instruction="",
    )
    prompts = data.file_prompts()
    golds = {prompt.text: prompt.extra["gold"] for prompt in prompts["train_file"]}
    assert golds == {"one": r"\frac12", "two": "2", "three": "3", "seven": "7"}
    assert "left out 3 of 9 rows" in caplog.text
    assert "2 with no answer, 1 with several answers" in caplog.text
    assert "left out 2 of 6 problems" in caplog.text
    assert texts(data.heldout_prompts("val")["val"]) == ["ei ght"]
    assert texts(data.heldout_prompts("test")["test"]) == ["nine"]


def test_the_instruction_follows_the_problem(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"problem": "What?", "answer": "1"}])
    other = write_jsonl(tmp_path / "b.jsonl", [{"problem": "Why?", "answer": "1"}])
    data = MathDataModule(train_file=file, eval_file=other)
    said = r"Let's think step by step and output the final answer within \boxed{}."
    assert data.train_prompt(0).text == f"What? {said}"
    assert texts(data.heldout_prompts("test")["test"]) == [f"Why? {said}"]  # no test_file


def test_a_file_is_shuffled_anew_every_pass(tmp_path: Path) -> None:
    rows = [{"problem": letter, "answer": "1"} for letter in "abcdefg"]
    files = {
        "train_file": write_jsonl(tmp_path / "a.jsonl", rows),
        "eval_file": write_jsonl(tmp_path / "b.jsonl", [{"problem": "z", "answer": "1"}]),
    }
    data = MathDataModule(**files, instruction="")
    stream = [data.train_prompt(index).text for index in range(35)]
    passes = [stream[start : start + 7] for start in range(0, 35, 7)]
    assert all(sorted(order) == list("abcdefg") for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    backwards = MathDataModule(**files, instruction="")
    assert [backwards.train_prompt(i).text for i in reversed(range(35))] == stream[::-1]
    other = MathDataModule(**files, instruction="", seed=1)
    assert [other.train_prompt(index).text for index in range(35)] != stream


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", None, r"data\.train_file=.*a\.jsonl cannot be read \(No such file.*give"),
        ("a.jsonl", "{", r"a\.jsonl:1: the line is not JSON"),
        ("a.jsonl", "\n[]", r"a\.jsonl:2: the line is no object"),
        ("a.jsonl", '{"question": 1, "answer": 2}', r"a\.jsonl:1: no column 'problem'.*question"),
        ("a.jsonl", '{"problem": "p"}', r"a\.jsonl:1: no column 'answer'; rename or add it"),
        ("a.jsonl", '{"problem": 3, "answer": 2}', r"a\.jsonl:1: problem='3' is no text"),
        ("a.jsonl", '{"problem": "p", "answer": [2]}', r"a\.jsonl:1: answer='\[2\]' is neither"),
        ("a.jsonl", "", "holds no problem with one answer"),
        ("a.jsonl", '{"problem": "z", "answer": 1}', "holds no problem that is not held out"),
        ("a.csv", "problem,answer", r"data\.train_file=.*a\.csv is of an unknown kind; give"),
        ("a.dat", "problem,answer", r"data\.train_file=.*a\.dat is of an unknown kind; give"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"problem": "z", "answer": "1"}])
    with pytest.raises(ValueError, match=said) as raised:
        MathDataModule(train_file=str(tmp_path / name), eval_file=held_out).file_prompts()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_file": "a.jsonl"}, "data.train_file=a.jsonl and data.eval_file=None go together"),
        ({"eval_file": "a.jsonl"}, "data.train_file=None and data.eval_file=a.jsonl go together"),
        ({"test_file": "a.jsonl"}, "data.test_file=a.jsonl needs data.train_file"),
        ({"workers": 0}, "data.workers=0 must be at least 1"),
        ({"timeout": 0.0}, "data.timeout=0.0 must be above 0"),
        ({"val_size": 0}, "data.val_size=0 must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        MathDataModule(**options)


def test_files_have_no_vocabulary_and_their_worked_solutions_as_demonstrations(
    tmp_path: Path,
) -> None:
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"problem": "z", "answer": 1}])
    rows = [{"problem": "a", "answer": 1}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    data = MathDataModule(train_file=file, eval_file=held_out)
    with pytest.raises(ValueError, match="no closed vocabulary"):
        data.vocabulary()
    with pytest.raises(Refused, match=r"no worked solutions .*; set warm_start to null"):
        data.demonstration(0, False)
    rows += [
        {"problem": "b", "solution": "It is $\\boxed{2}$."},
        {"problem": "c", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
        {"problem": "d", "answer": 4, "solution": "2 + 2"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    for answer_in, endings in {
        "box": [
            "It is $\\boxed{2}$.",
            "\nThe answer is \\boxed{3}.",
            "\nThe answer is \\boxed{4}.",
        ],
        "hash": ["It is $\\boxed{2}$.\n#### 2", "1 + 2 = 3\n#### 3", "2 + 2\n#### 4"],
        "number": ["$.\nThe answer is 2.", "1 + 2 = 3\nThe answer is 3.", "\nThe answer is 4."],
    }.items():
        options: dict[str, Any] = {"train_file": file, "eval_file": held_out}
        data = MathDataModule(**options, answer_in=answer_in)  # type: ignore[arg-type]
        shown = sorted((data.demonstration(i, False) for i in range(3)), key=lambda x: x[0].text)
        for (prompt, response), problem, end in zip(shown, "bcd", endings, strict=True):
            assert prompt.fields == {"problem": problem} and response.endswith(end)
            assert data.score([response], batch([prompt.extra["gold"]])).tolist() == [1.0]
            assert "<<" not in response
    with pytest.raises(Refused, match=r"set warm_start\.misleading_fraction to 0"):
        data.demonstration(0, True)


def test_parquet_and_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"problem": ["p"], "answer": [1]}).to_parquet(file)
    assert list(read_rows("x", file)) == [(f"{file}: row 0", {"problem": "p", "answer": 1})]

    def load(name: str, split: str) -> list[dict[str, str]]:
        return [{"problem": f"{name} {split}", "answer": "1"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = MathDataModule(train_file="some/v1.5", eval_file="other/name", instruction="")
    assert texts([data.train_prompt(0)]) == ["some/v1.5 train"]
    assert texts(data.heldout_prompts("val")["val"]) == ["other/name test"]


# ----- long prompts


def lengths(tmp_path: Path, **options: Any) -> MathDataModule:
    """Training prompts of 1 to 5 words, 300 of each, and held-out ones of 2 and 4."""
    rows = [{"problem": " ".join("abcde"[:n]), "answer": str(n)} for n in range(1, 6)] * 300
    held_out = [{"problem": "x y", "answer": "1"}, {"problem": "x y z x", "answer": "1"}]
    return MathDataModule(
        train_file=write_jsonl(tmp_path / "train.jsonl", rows),
        eval_file=write_jsonl(tmp_path / "eval.jsonl", held_out),
        instruction="",
        **options,
    )


def test_long_prompts_of_files_are_dropped_and_counted(
    tmp_path: Path, words: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    data = lengths(tmp_path, long_prompts="drop", max_prompt_length=3)
    data.check(words)
    assert "left out 600 of 1500 prompts of data.train_file" in caplog.text
    assert "left out 1 of 2 prompts of data.eval_file" in caplog.text
    stream = texts([data.train_prompt(index) for index in range(900)])
    assert sorted(set(stream)) == ["a", "a b", "a b c"] and stream.count("a") == 300
    assert texts(data.heldout_prompts("val")["val"]) == ["x y"]
    assert data.longest_prompt == 3


def test_a_long_prompt_anywhere_in_a_file_is_an_error(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [{"problem": "a", "answer": "1"}] * 3000 + [{"problem": "a b c", "answer": "1"}]
    data = MathDataModule(
        train_file=write_jsonl(tmp_path / "train.jsonl", rows),
        eval_file=write_jsonl(tmp_path / "eval.jsonl", [{"problem": "z", "answer": "1"}]),
        instruction="",
        max_prompt_length=2,
    )
    with pytest.raises(ValueError, match=r"data\.max_prompt_length=2 .*'a b c' of 3 tokens"):
        data.check(words)


def test_an_error_about_a_prompt_names_its_row_and_shows_its_end(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    """The beginning is the same for all prompts of a chat."""
    templated = copy.deepcopy(words)
    templated.chat_template = "{% for m in messages %}a b {{ m.content }}{% endfor %}"
    rows = [{"problem": "a b c"}, {"problem": "a " * 300 + "z"}, {"problem": "a %"}]
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"problem": "x", "answer": 1}])
    for row, said in ((rows[1], "a a z'"), (rows[2], "'a %'")):
        file = write_jsonl(tmp_path / "a.jsonl", [{**r, "answer": 1} for r in (rows[0], row)])
        for tokenizer in (words, templated):
            data = MathDataModule(train_file=file, eval_file=held_out, instruction="")
            data.max_prompt_length = 99
            with pytest.raises(ValueError, match=re.escape(f"{file}:2: the prompt ")) as raised:
                data.check(tokenizer)
            assert said in str(raised.value) and len(str(raised.value)) < 450
    templated.chat_template = (
        "{% for m in messages %}{% if 'c' in m.content %}{{ raise_exception('no c') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=re.escape(f"{file}:1: the prompt 'a b c': ")):
        MathDataModule(train_file=file, eval_file=held_out, instruction="").check(templated)


def test_dropping_leaves_something(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    data = lengths(tmp_path, long_prompts="drop", max_prompt_length=1)
    with pytest.raises(ValueError, match=r"too short for all 2 prompts of data\.eval_file"):
        data.check(words)


@pytest.mark.parametrize("task", [MathDataModule, CountdownDataModule])
def test_generated_prompts_are_not_dropped(
    task: type[MathDataModule], words: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"data\.long_prompts=drop needs prompts of a file"):
        task(long_prompts="drop").check(words)


def test_a_chat_template_that_refuses_the_prompt_is_named(words: PreTrainedTokenizerBase) -> None:
    strict = copy.deepcopy(words)
    strict.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(ValueError, match=r"the policy's chat template refuses .* user .*no user"):
        MathDataModule().check(strict)


# ----- scores


@pytest.fixture
def scored() -> Iterator[MathDataModule]:
    data = MathDataModule(workers=1)
    yield data
    data.teardown()


def test_scores_of_the_worker_pool(scored: MathDataModule) -> None:
    golds = [r"\sqrt{3}", "61"]
    responses = [
        r"\boxed{\frac{\sqrt{12}}{2}}",  # for the worker
        r"\boxed{\frac{\sqrt{12}}{3}}",
        r"thus \boxed{ 61 }",
        "61",
    ]
    scores = scored.score(responses, batch(golds))
    assert scores.tolist() == [1.0, 0.0, 1.0, 0.0] and scores.dtype == torch.float32
    assert scored.scorer_timeouts() == 0
    first = scored._scorer.pids
    assert len(first) == 1
    scored.teardown()
    assert scored._scorer.pids == []
    scored.score([r"\boxed{\sqrt{27}}"], batch([r"3\sqrt{3}"]))
    assert scored._scorer.pids != first  # it starts again when it is needed again


def test_timeouts_score_0_and_are_counted() -> None:
    data = MathDataModule(workers=1, timeout=0.2)
    data._scorer.start()
    os.kill(data._scorer.pids[0], signal.SIGSTOP)
    responses = [r"\boxed{\frac{\sqrt{12}}{2}}"] * 2 + [r"\boxed{5}"]
    assert data.score(responses, batch([r"\sqrt{3}"] * 2 + ["5"])).tolist() == [0.0, 0.0, 1.0]
    assert data.scorer_timeouts() == 2 and data.scorer_timeouts() == 0
    data.teardown()


# ----- whole runs

TINY = {
    "class_path": "tre_lightning.tasks.MathDataModule",
    "init_args": {
        "arithmetic": {"number_range": [1, 6], "max_value": 24},
        "instruction": "",
        "batch_size": 4,
        "iterations_per_epoch": 2,
        "val_size": 6,
        "test_size": 5,
        "eval_batch_size": 4,
        "workers": 1,
    },
}
RUN: dict[str, Any] = {"data": TINY, "model.rollout": {"num_responses": 4, "max_new_tokens": 18}}


def test_fit_test_and_predict(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    runs.run(run_dir, changes=RUN)
    curves = runs.scalars(run_dir)
    assert [step for step, _ in curves["val/pass@1"]] == [0, 1, 3]
    assert [value for _, value in curves["rollout/unscorable_fraction"]] == [0.0] * runs.ITERATIONS
    assert [value for _, value in curves["rollout/scorer_timeouts"]] == [0.0] * runs.ITERATIONS
    assert [step for step, _ in curves["val/majority@2"]] == [0, 1, 3]
    scores = runs.run(run_dir, "--ckpt_path=last", command="test", changes=RUN)
    assert 0.0 <= float(scores.trainer.callback_metrics["test/pass@1"]) <= 1.0
    runs.run(run_dir, "--ckpt_path=last", command="predict", changes=RUN)
    records = [json.loads(line) for line in (run_dir / "predictions.jsonl").open()]
    assert len(records) == 5
    for record in records:
        value = eval(record["prompt"].removesuffix("="))  # our own problem
        boxed = [last_boxed(response) for response in record["responses"]]
        right = [answer is not None and answer.strip() == str(value) for answer in boxed]
        assert record["scores"] == [float(is_right) for is_right in right]


class SlowScorer(MathDataModule):
    """Gives up three answers of every training batch, and one of every other batch."""

    given_up = 0

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        self.given_up += 3 if prompts.split == "train" else 1
        return torch.zeros(len(responses))

    def scorer_timeouts(self) -> int:
        count, self.given_up = self.given_up, 0
        return count


def test_timeouts_of_an_iteration_are_logged_without_those_of_validation(tmp_path: Path) -> None:
    slow = {**TINY, "class_path": "test_math_prompts.SlowScorer"}
    runs.run(tmp_path / "run", changes={**RUN, "data": slow})
    counts = [value for _, value in runs.scalars(tmp_path / "run")["rollout/scorer_timeouts"]]
    assert counts == [3.0] * runs.ITERATIONS


def test_the_task_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (runs.ROOT / "docs" / "tasks.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "backwards.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"batch_size": 4, "iterations_per_epoch": 2}
    changes = {"data": {"class_path": "backwards.Backwards", "init_args": options}}
    runs.run(tmp_path / "run", changes=changes)
    curves = runs.scalars(tmp_path / "run")
    assert [step for step, _ in curves["val/pass@1"]] == [0, 1, 3]
    task = importlib.import_module("backwards").Backwards()
    first, other = task.train_prompt(0), task.train_prompt(1)
    gold = " ".join(first.text.removesuffix(" :").split()[::-1])
    assert task.score([gold, first.text, "", gold + " a"], batch([gold])).tolist() == [1, 0, 0, 0]
    assert first.text != other.text and first.text[0] != "a"
