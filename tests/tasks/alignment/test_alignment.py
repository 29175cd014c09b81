"""The preference task: its prompts, its scores, and the chain from reward model to policy."""

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

import runs
from reward_servers import rewarding
from runs import write_jsonl
from tre_lightning.batches import PromptBatch
from tre_lightning.cli.main import PPOCLI, RewardCLI, main
from tre_lightning.policy.tokenizers import word_tokenizer
from tre_lightning.tasks.alignment.pairs import (
    PreferencePairs,
    load_pairs,
    synthetic_vocabulary,
)
from tre_lightning.tasks.alignment.prompts import PreferenceDataModule, RewardArgs, read_prompt
from tre_lightning.tasks.alignment.scorer import RewardModelScorer

PAIRS = "tre_lightning.tasks.PreferencePairs"
ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 192,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
REWARD: dict[str, Any] = {
    "model": {"policy": {"architecture": ARCHITECTURE}, "lr": 0.01},
    "data": {
        "class_path": PAIRS,
        "init_args": {"synthetic_size": 64, "batch_size": 16, "max_length": 64, "val_size": 16},
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1},
}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """A tokenizer of the synthetic words."""
    fields = dict(ARCHITECTURE)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    more = [*(f"w{n}" for n in range(50)), "System:", "s", "u", "a"]
    return word_tokenizer([*synthetic_vocabulary(), *more], config)


@pytest.fixture(scope="module")
def reward_dir(words: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random reward model of the synthetic words."""
    fields = {**ARCHITECTURE, "num_labels": 1, "initializer_range": 0.5}
    config = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
    config.pad_token_id = words.pad_token_id
    directory = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    words.save_pretrained(directory)
    return str(directory)


def prompts_of(task: PreferenceDataModule, stage: str) -> list[str]:
    return [prompt.text for prompt in task.heldout_prompts(stage)[stage]]


def trained_on(task: PreferenceDataModule, number: int) -> list[str]:
    return [task.train_prompt(index).text for index in range(number)]


# ----- rows

USER = {"role": "user", "content": "w1 w2"}
REPLY = {"role": "assistant", "content": "w3"}
WORSE = {"role": "assistant", "content": "w4"}
SYSTEM = {"role": "system", "content": "w5"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "w1 w2"}, [USER]),
        ({"prompt": "\n\nHuman: w1 w2\n\nAssistant:"}, [USER]),
        ({"prompt": [SYSTEM, USER], "other": 3}, [SYSTEM, USER]),
        ({"prompt": "w1 w2", "chosen": [USER, REPLY], "rejected": [USER, WORSE]}, [USER]),
        ({"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}, [USER]),
        (
            {
                "chosen": "\n\nHuman: w1 w2\n\nAssistant: w3\n\nHuman: w1 w2\n\nAssistant: w3",
                "rejected": "\n\nHuman: w1 w2\n\nAssistant: w3\n\nHuman: w1 w2\n\nAssistant: w4",
            },
            [USER, REPLY, USER],
        ),
        ({"prompt": "w1 w2", "chosen": "w3", "rejected": "w3"}, None),
        ({"prompt": "w1 \ud800"}, [{"role": "user", "content": "w1 ?"}]),
    ],
)
def test_forms_of_a_row(row: dict[str, Any], messages: Any) -> None:
    assert read_prompt(row, "here") == messages


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "w1"}, "prompt=None is neither text nor messages"),
        ({"prompt": []}, "is neither text nor messages"),
        ({"prompt": [USER, REPLY]}, "ends with the assistant's message"),
        ({"chosen": "w1", "rejected": "w2"}, "no prompt"),
    ],
)
def test_bad_rows_are_told_where(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.jsonl:3: ") as raised:
        read_prompt(row, "data.jsonl:3")
    assert told in str(raised.value)


# ----- sets


def test_synthetic_sets_are_disjoint_and_do_not_depend_on_the_sizes() -> None:
    task = PreferenceDataModule(RewardArgs(url="http://127.0.0.1:9"), val_size=40, test_size=50)
    train, val, test = trained_on(task, 2000), prompts_of(task, "val"), prompts_of(task, "test")
    assert len(set(val)) == 40 and len(set(test)) == 50
    assert not set(val) & set(test) and not set(train) & {*val, *test}
    assert len(set(train)) > 1000
    assert task.demonstration(7, False)[0] == train[7]
    more = PreferenceDataModule(RewardArgs(url="http://127.0.0.1:9"), val_size=60, test_size=5)
    assert trained_on(more, 20) == train[:20] and prompts_of(more, "val")[:40] == val
    other = PreferenceDataModule(RewardArgs(url="http://127.0.0.1:9"), seed=1)
    assert trained_on(other, 20) != train[:20]


def test_demonstrations_are_the_better_or_the_worse_response() -> None:
    task = PreferenceDataModule(RewardArgs(url="http://127.0.0.1:9"))
    for index in range(20):
        (prompt, good), (same, bad) = (task.demonstration(index, bad) for bad in (False, True))
        assert prompt == same and good != bad
        assert courteous(good) and on_topic(good, prompt)
        assert not (courteous(bad) and on_topic(bad, prompt))


def courteous(response: str) -> bool:
    return response.split()[-1] in ("thanks", "welcome", "gladly", "cheers")


def on_topic(response: str, prompt: str) -> bool:
    return response.split()[2] in prompt.split()


def numbered(numbers: range) -> list[dict[str, Any]]:
    return [{"prompt": f"w{number}"} for number in numbers]


def of_files(words: PreTrainedTokenizerBase, reward: str, **options: Any) -> PreferenceDataModule:
    sizes = {"val_size": 3, "test_size": 4}
    task = PreferenceDataModule(RewardArgs(model=reward), **{**sizes, **options})
    task.check(words)
    return task


def test_sizes_of_one_file(tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str) -> None:
    rows = numbered(range(20)) + numbered(range(20))  # every prompt twice
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    task = of_files(words, reward_dir, train_file=file, train_size=10)
    train, val, test = trained_on(task, 10), prompts_of(task, "val"), prompts_of(task, "test")
    assert [len(set(s)) for s in (train, val, test)] == [10, 3, 4]
    assert len({*train, *val, *test}) == 17  # disjoint
    assert set(trained_on(task, 30)[10:]) == set(train)  # another pass over the same
    turned = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    again = of_files(words, reward_dir, train_file=turned, train_size=10)
    assert prompts_of(again, "test") == test and trained_on(again, 10) == train
    other = of_files(words, reward_dir, train_file=file, train_size=10, seed=1)
    assert prompts_of(other, "test") != test
    whole = of_files(words, reward_dir, train_file=file)
    assert len(set(trained_on(whole, 13))) == 13  # train_size: none


def test_two_files_and_what_the_reward_model_has_seen(
    tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str
) -> None:
    files = {
        "train_file": write_jsonl(tmp_path / "train.jsonl", numbered(range(20))),
        "eval_file": write_jsonl(tmp_path / "eval.jsonl", numbered(range(10, 25))),
        "exclude_file": write_jsonl(
            tmp_path / "seen.jsonl",
            [
                {
                    "chosen": [{"role": "user", "content": f"w{n}"}, REPLY],
                    "rejected": [{"role": "user", "content": f"w{n}"}, WORSE],
                }
                for n in (0, 1, 12, 24, 40)
            ],
        ),
    }
    task = of_files(words, reward_dir, **files)
    names = {f"\n\nHuman: w{n}\n\nAssistant:" for n in range(2, 10)}
    assert set(trained_on(task, 8)) == names  # neither seen nor in eval_file
    held_out = {*prompts_of(task, "val"), *prompts_of(task, "test")}
    allowed = {f"\n\nHuman: w{n}\n\nAssistant:" for n in range(10, 24) if n != 12}
    assert len(held_out) == 7 and held_out <= allowed
    assert task.excluded == 5  # 0, 1 and 12 of train_file; 12 and 24 of eval_file


def pair_rows(prompts: Sequence[str], equal: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Pairs of the form of UltraFeedback; both responses are equal in the rows ``equal``."""
    return [
        {
            "chosen": [{"role": "user", "content": prompt}, REPLY],
            "rejected": [{"role": "user", "content": prompt}, REPLY if n in equal else WORSE],
        }
        for n, prompt in enumerate(prompts)
    ]


def test_sets_are_cut_from_the_rows_as_the_authors_cut_them(
    tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str
) -> None:
    datasets = pytest.importorskip("datasets")
    prompts = [f"w{n}" for n in range(30)]
    rows = pair_rows(prompts, equal=range(0, 30, 3))  # these count, too
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    order = datasets.Dataset.from_list(rows).shuffle(seed=42)
    expected = [f"\n\nHuman: {row['chosen'][0]['content']}\n\nAssistant:" for row in order]
    options = {"train_file": file, "train_size": 12, "test_size": 8, "shuffle_seed": 42}
    task = of_files(words, reward_dir, **options, val_size=None)
    assert prompts_of(task, "test") == prompts_of(task, "val") == expected[12:20]
    assert sorted(trained_on(task, 12)) == sorted(expected[:12])
    task = of_files(words, reward_dir, **options, val_size=5)
    assert prompts_of(task, "test") == expected[12:20]
    assert prompts_of(task, "val") == expected[20:25]


def test_what_is_left_out_of_the_rows_moves_no_other_row(
    tmp_path: Path,
    words: PreTrainedTokenizerBase,
    reward_dir: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    order = [3, 2, 5, 4, 1, 0]  # numpy's permutation of 6 by the seed 42
    texts = ["w0", "w1", "w2", "w1", "w4 w4 w4 w4", "w5"]  # row 3 is trained on, row 1 tested
    file = write_jsonl(tmp_path / "a.jsonl", pair_rows(texts))
    options = {"train_file": file, "train_size": 4, "test_size": 2, "val_size": None}
    options |= {"shuffle_seed": 42, "max_prompt_length": 4, "long_prompts": "drop"}
    task = of_files(words, reward_dir, **options)
    named = [f"\n\nHuman: {texts[row]}\n\nAssistant:" for row in order]
    assert set(trained_on(task, 4)) == {named[1], named[2]}  # not row 3, nor the long one
    assert prompts_of(task, "test") == [named[4], named[5]]
    assert "left out 1 of 4 train prompts that are held out or excluded too" in caplog.text
    assert "left out 1 of 3 prompts of data.train_file (train) longer than" in caplog.text
    seen = write_jsonl(tmp_path / "seen.jsonl", [{"prompt": "w0"}, {"prompt": "w2"}])
    task = of_files(words, reward_dir, **options, exclude_file=seen)
    assert prompts_of(task, "test") == [named[4]] and set(trained_on(task, 3)) == {named[2]}
    assert task.excluded == 2


def test_validation_on_the_test_prompts(
    tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", numbered(range(20)))
    for options in ({"train_file": file}, {}):
        task = of_files(words, reward_dir, **options, val_size=None)
        assert prompts_of(task, "val") == prompts_of(task, "test") != []
        assert not {*prompts_of(task, "test")} & {*trained_on(task, 16)}


@pytest.mark.parametrize("seed", [None, 42])
def test_pairs_of_prompts_that_are_kept_for_the_policy(tmp_path: Path, seed: int | None) -> None:
    order = [3, 2, 5, 4, 1, 0] if seed else [*range(6)]
    texts = ["a", "b", "c", "d", "e", "f"]
    texts[order[-1]] = texts[order[0]]  # another pair of a prompt that is kept
    rows = pair_rows(texts, equal=[order[-2]])
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = load_pairs(file, shuffle_seed=seed, skip_rows=2)
    assert [pair.prompt[0]["content"] for pair in pairs] == [texts[row] for row in order[2:4]]  # type: ignore[index]
    with pytest.raises(ValueError, match="holds no pair"):
        load_pairs(file, shuffle_seed=seed, skip_rows=6)
    data = PreferencePairs(file, shuffle_seed=seed, skip_rows=2, val_size=1)
    data.setup()
    assert data._all == pairs


def test_the_configuration_of_a_dataset_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(source: str, **options: str) -> list[dict[str, Any]]:
        asked.append((source, options))
        return pair_rows(["a", "b"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    PreferencePairs("some/pairs", val_size=1).setup()
    PreferencePairs("some/pairs", val_size=1, name="this").setup()
    plain = ("some/pairs", {"split": "train"})
    assert asked == [plain, ("some/pairs", {"split": "train", "name": "this"})]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"skip_rows": -1}, "data.skip_rows=-1 must be at least 0"),
        ({"skip_rows": 3}, "data.skip_rows=3 needs data.source"),
        ({"shuffle_seed": 42}, "data.shuffle_seed=42 needs data.source"),
    ],
)
def test_pair_options_that_cannot_work(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        PreferencePairs(**options)


def test_long_prompts_leave_the_sizes_as_they_are(
    tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str
) -> None:
    rows = numbered(range(12)) + [{"prompt": f"w{n} w1 w1"} for n in range(12)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"train_file": file, "max_prompt_length": 4, "train_size": 5}
    task = of_files(words, reward_dir, **options, long_prompts="drop")
    assert len(set(trained_on(task, 5))) == 5 and task.longest_prompt == 3  # Human: w3 Assistant:
    with pytest.raises(ValueError, match=r"data.max_prompt_length=4 is too short"):
        of_files(words, reward_dir, **options)


def test_a_chat_template_gets_the_messages(
    tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str
) -> None:
    rows = [{"prompt": [SYSTEM, {"role": "user", "content": f"w{n}"}]} for n in range(9)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    words.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}a"
    try:
        task = of_files(words, reward_dir, train_file=file)
        first = task.train_prompt(0)
        assert task.render(first) == f"s w5 u {first.extra['messages'][1]['content']} a"
        words.chat_template = "{{ raise_exception('no system') }}"
        with pytest.raises(ValueError, match="refuses messages of the roles system user"):
            of_files(words, reward_dir, train_file=file)
    finally:
        words.chat_template = None
    task = of_files(words, reward_dir, train_file=file)
    assert task.render(first) == first.text
    user = first.extra["messages"][1]["content"]
    assert first.text == f"\n\nSystem: w5\n\nHuman: {user}\n\nAssistant:"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"val_size": 0}, "data.val_size=0"),
        ({"eval_file": "x.jsonl"}, "data.eval_file=x.jsonl needs data.train_file"),
        ({"train_size": 5}, "data.train_size=5 needs data.train_file"),
        ({"shuffle_seed": 5}, "data.shuffle_seed=5 needs data.train_file"),
        ({"shuffle_seed": 5, "train_file": "x.jsonl"}, "give data.train_size, and leave out"),
        (
            {"shuffle_seed": 5, "train_file": "x", "train_size": 1, "eval_file": "y"},
            "leave out data.eval_file",
        ),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as raised:
        PreferenceDataModule(RewardArgs(url="http://127.0.0.1:9"), **options)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_too_few_prompts(tmp_path: Path, words: PreTrainedTokenizerBase, reward_dir: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", numbered(range(7)))
    with pytest.raises(ValueError, match=r"only 0 prompts of .* are left for data.train_size=None"):
        of_files(words, reward_dir, train_file=file)
    with pytest.raises(ValueError, match=r"only 7 prompts of .* are left for data.test_size=8"):
        of_files(words, reward_dir, train_file=file, test_size=8)
    same = write_jsonl(
        tmp_path / "same.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w2"}]
    )
    with pytest.raises(ValueError, match=r"data.exclude_file=.* holds no prompt"):
        of_files(words, reward_dir, train_file=file, exclude_file=same)
    task = PreferenceDataModule(RewardArgs(model=reward_dir), val_size=1000)
    with pytest.raises(ValueError, match=r"data.val_size=1000, but there are only about"):
        task.heldout_prompts("val")


# ----- scores


@pytest.mark.parametrize("templated", [False, True])
def test_what_a_server_of_another_protocol_is_asked(
    templated: bool, tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    asked: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, **request})
            body = json.dumps({"rewards": [1.0] * len(request["prompts"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    rows = [{"prompt": "w1 w2"}, *numbered(range(3, 12))]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    sizes = {"batch_size": 2, "val_size": 3, "test_size": 4}
    if templated:
        words.chat_template = "{% for m in messages %}u {{ m.content }} {% endfor %}a"
    try:
        for protocol in ("predict", "openrlhf"):
            with serving(ThreadingHTTPServer(("127.0.0.1", 0), Server)) as url:
                args = RewardArgs(url=url, protocol=protocol)  # type: ignore[arg-type]
                task = PreferenceDataModule(args, train_file=file, **sizes)
                task.check(words)
                prompts = next(iter(task.train_dataloader()))
                scores = task.score(["r1", "r2", "r3", "r4"], prompts)
            assert scores.tolist() == [1.0] * 4
    finally:
        words.chat_template = None
    contents = [extra["messages"][0]["content"] for extra in prompts.extras for _ in range(2)]
    _, predict, _, openrlhf = asked  # each is tried out once before
    assert predict == {
        "path": "/predict",
        "prompts": contents,
        "responses": ["r1", "r2", "r3", "r4"],
    }
    texts = [f"u {c} a" if templated else f"\n\nHuman: {c}\n\nAssistant:" for c in contents]
    assert openrlhf["path"] == "/get_reward" and openrlhf["prompts"] == texts
    assert openrlhf["query"] == [f"{t}r{n}{words.eos_token}" for n, t in enumerate(texts, 1)]
    assert openrlhf["labels"] == [""] * 4


def test_a_prompt_that_a_protocol_cannot_send_is_refused_before_any_request(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [*numbered(range(9)), {"prompt": [SYSTEM, USER]}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    args = RewardArgs(url="http://127.0.0.1:9", protocol="predict", retries=0)
    task = PreferenceDataModule(args, train_file=file, val_size=3, test_size=4)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:10: data\.reward\.protocol=predict sends .*use"
    ):
        task.check(words)


def test_a_protocol_needs_a_server(reward_dir: str) -> None:
    with pytest.raises(ValueError, match=r"data\.reward\.protocol=openrlhf is that of a server"):
        RewardArgs(model=reward_dir, protocol="openrlhf")


@contextmanager
def serving(server: Any) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_both_ways_give_the_same_scores(words: PreTrainedTokenizerBase, reward_dir: str) -> None:
    task = PreferenceDataModule(RewardArgs(model=reward_dir, batch_size=3), batch_size=2)
    task.check(words)
    batch = task._train_batch(0, 0)
    assert isinstance(batch, PromptBatch)
    responses = ["well , bread", "stupid", "", " ".join(["rain"] * 100)]
    scores = task.score(responses, batch)
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    assert scores.isnan().tolist() == [False, False, False, True]  # the last one is too long
    # Rows 0 and 1 answer the first prompt, rows 2 and 3 the second.
    alone = RewardModelScorer(reward_dir)
    prompts = [task.train_prompt(row).text for row in (0, 0, 1, 1)]
    expected = torch.tensor(alone.score(prompts, responses))
    torch.testing.assert_close(scores, expected, equal_nan=True)
    with rewarding(alone) as url:
        remote = PreferenceDataModule(RewardArgs(url=url), batch_size=2)
        remote.check(words)
        torch.testing.assert_close(remote.score(responses, batch), scores, equal_nan=True)


# ----- the whole chain


def reward_words(directory: Path, *flags: str) -> list[str]:
    file = directory / "reward.json"
    file.write_text(json.dumps(REWARD))
    run_dir = directory / "reward_run"
    paths = (f"--trainer.default_root_dir={run_dir}", f"--model.output_dir={directory / 'rm'}")
    return ["--config", str(file), *paths, *flags]


def ppo_words(directory: Path, command: str = "fit", **reward: Any) -> list[str]:
    config = {
        "model": {
            "policy": {"architecture": {**ARCHITECTURE, "vocab_size": 128}},
            "rollout": {"num_responses": 2, "max_new_tokens": 12},
            "evaluation": {"num_responses": 2},
            "ppo": {"num_minibatches": 2},
            "optim": {"lr": 0.003, "critic_lr": 0.01},
        },
        "data": {
            "class_path": "tre_lightning.tasks.PreferenceDataModule",
            "init_args": {
                "reward": reward,
                "batch_size": 4,
                "iterations_per_epoch": 3,
                "val_size": 4,
                "test_size": 5,
            },
        },
        "warm_start": {"steps": 3, "batch_size": 8, "cache_dir": str(directory / "warm")},
        "checkpoint": {"monitor": "val/score"},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "callbacks": [runs.TRE],
            "default_root_dir": str(directory / "ppo"),
        },
    }
    file = directory / "ppo.json"
    file.write_text(json.dumps(config))
    return [command, "--config", str(file)]


def test_from_reward_model_to_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: runs.Said
) -> None:
    cli = main(["reward", "fit", *reward_words(tmp_path)])
    assert isinstance(cli, RewardCLI) and "accuracy" in capsys.readouterr().out
    logged = runs.scalars(tmp_path / "reward_run")
    assert len(logged["reward/loss"]) == 3 and len(logged["val/accuracy"]) == 1
    page = (runs.ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{tag}`" in page for tag in logged), logged
    assert not list((tmp_path / "reward_run").rglob("*.ckpt"))
    message = refusal(main, ["fit", *reward_words(tmp_path)])  # the same without the word
    assert f"model.output_dir={tmp_path}/rm already exists" in message

    words = ppo_words(tmp_path, model=f"{tmp_path}/rm")
    main(words)
    scalars = runs.scalars(tmp_path / "ppo")
    assert [step for step, _ in scalars["val/score"]] == [0, 2, 5]
    assert max(score for _, score in scalars["rollout/unscorable_fraction"]) == 0.0
    names = runs.weights(tmp_path / "ppo").keys()
    assert all(name.startswith("actor_critic.") for name in names)  # the reward model is in none
    tested = main(["test", *words[1:], "--ckpt_path=last"])
    assert isinstance(tested, PPOCLI)
    score = float(tested.trainer.callback_metrics["test/score"])
    assert score == score


class Mortal(ThreadingHTTPServer):
    """Scores every response by its number of words, and is gone after some requests."""

    def __init__(self, requests: int) -> None:
        super().__init__(("127.0.0.1", 0), Scorer)
        self.left = requests


class Scorer(BaseHTTPRequestHandler):
    server: Mortal

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.left -= 1
        if self.server.left < 0:
            self.close_connection = True
            return
        scores = [float(len(response.split())) for response in request["responses"]]
        body = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("every", [1, 10])
def test_a_server_that_dies(every: int, tmp_path: Path, refusal: runs.Said) -> None:
    def words(name: str, url: str, *flags: str) -> list[str]:
        run_dir = f"--trainer.default_root_dir={tmp_path / name}"
        saves = f"--checkpoint.every_n_iterations={every}"
        return [*ppo_words(tmp_path, url=url, retries=0, timeout_s=5), run_dir, saves, *flags]

    with serving(Mortal(10**6)) as url:
        main(words("whole", url))
    # One to try it, one validation, iterations 0 to 2, another validation, iterations 3 and 4.
    with serving(Mortal(8)) as url:
        message = refusal(main, words("cut", url), code=1)
    assert f"reward server {url}" in message and "--ckpt_path last" in message
    assert runs.saved_iteration(tmp_path / "cut") == 5  # nothing of the training is lost
    time.sleep(1.0)  # TensorBoard reads event files in the order of the seconds in their names
    with serving(Mortal(10**6)) as url:
        main(words("cut", url, "--ckpt_path=last"))
    assert runs.distance(runs.weights(tmp_path / "whole"), runs.weights(tmp_path / "cut")) == 0.0
    curves = runs.scalars(tmp_path / "cut")
    for tag, events in runs.scalars(tmp_path / "whole").items():
        assert curves[tag] == events, tag


def test_a_server_that_dies_in_a_validation(tmp_path: Path, refusal: runs.Said) -> None:
    with serving(Mortal(5)) as url:
        words = ppo_words(tmp_path, url=url, retries=0)
        assert "--ckpt_path last" in refusal(main, words, code=1)
    assert runs.saved_iteration(tmp_path / "ppo") == 3
    with serving(Mortal(1)) as url:  # in the validation before the training: nothing to save
        flag = f"--trainer.default_root_dir={tmp_path}/other"
        message = refusal(main, [*ppo_words(tmp_path, url=url, retries=0), flag], code=1)
    assert "--ckpt_path" not in message and not (tmp_path / "other" / "checkpoints").exists()


def test_what_cannot_work_is_refused_before_any_work(
    tmp_path: Path, refusal: runs.Said, model_dir: Path
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "give exactly one of data.reward.model"),
        ({"model": "x", "url": "http://127.0.0.1:9"}, "model=x, url=http://127.0.0.1:9"),
        ({"url": "ftp://x"}, "reward.url='ftp://x'"),
        ({"model": f"{tmp_path}/no"}, f"reward.model={tmp_path}/no"),
        ({"model": str(model_dir), "dtype": "int8"}, "dtype"),
        ({"url": "http://127.0.0.1:9", "retries": 0}, "reward server http://127.0.0.1:9"),
    ]
    for reward, told in cases:
        assert told in refusal(main, ppo_words(tmp_path, **reward)), told
    assert not (tmp_path / "ppo").exists() and not (tmp_path / "warm").exists()


# ----- configurations


@pytest.mark.parametrize("name", ["hh.yaml", "hh_tiny.yaml", "hh_1.5b.yaml", "hh_7b_unseen.yaml"])
def test_shipped_reward_configurations_can_be_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardCLI, "_run_subcommand", lambda self, subcommand: None)
    file = runs.CONFIGS / "reward" / name
    flags = [f"--trainer.default_root_dir={tmp_path}/run", "--trainer.accelerator=cpu"]
    flags += ["--trainer.precision=32", "--seed_everything=7"]
    for words in (["fit", f"--config={file}"], ["reward", "fit", "--config", str(file)]):
        cli = main([*words, *flags])
        assert isinstance(cli, RewardCLI) and cli.datamodule.seed == 7
        assert cli.model.output_dir == f"{tmp_path}/run/model"
        assert not cli.trainer.checkpoint_callbacks
    header = file.read_text()
    assert f"--config configs/reward/{name}" in header and "Run on:" in header


def test_the_last_data_class_says_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[type] = []
    for cli in (RewardCLI, PPOCLI):
        monkeypatch.setattr(cli, "__init__", lambda self, *args: chosen.append(type(self)))
    pairs, task, other = (tmp_path / name for name in ("pairs.yaml", "task.yaml", "other.yaml"))
    pairs.write_text(yaml.safe_dump({"data": {"class_path": PAIRS}}))
    task.write_text("data: {class_path: tre_lightning.tasks.CountdownDataModule}")
    other.write_text("trainer: {max_epochs: 1}")
    cases: list[tuple[list[str], type]] = [
        (["fit", f"--config={pairs}", "--config", str(other)], RewardCLI),
        (["fit", "--config", str(pairs), "--config", str(task)], PPOCLI),
        (["fit", "--config", str(task), f"--data={PAIRS}"], RewardCLI),
        (["fit", f"--config={task}", "--data.class_path", "PreferencePairs"], RewardCLI),
        (["fit", f"--config={tmp_path}/none.yaml"], PPOCLI),
        (["fit", "--help"], PPOCLI),
        (["validate", f"--config={pairs}"], PPOCLI),
    ]
    for words, expected in cases:
        main(words)
        assert chosen.pop() is expected, words
