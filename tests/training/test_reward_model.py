"""The reward model: pairs, texts, loss, a whole training, and scoring in this process."""

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import runs
from tre_lightning.policy.actor_critic import PolicyArgs
from tre_lightning.policy.chat import as_messages
from tre_lightning.policy.encoding import pad
from tre_lightning.policy.tokenizers import word_tokenizer
from tre_lightning.tasks.alignment.pairs import (
    Pair,
    PairBatch,
    PreferencePairs,
    load_pairs,
    read_pair,
    split_by_prompt,
    synthetic_pair,
    synthetic_prompt,
    synthetic_vocabulary,
)
from tre_lightning.tasks.alignment.scorer import RewardModelScorer, encode, scalar_scores
from tre_lightning.training.reward_model import PairMetrics, RewardModelModule, preference_loss

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
SMALL = {
    **ARCHITECTURE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def fit(module: RewardModelModule, data: PreferencePairs, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    ckpt_path = options.pop("ckpt_path", None)
    trainer = Trainer(**{**quiet, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def classifier(architecture: dict[str, Any], pad_token_id: int = 0, **more: Any) -> PreTrainedModel:
    """A random reward model."""
    fields = {**architecture, "num_labels": 1, **more}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.pad_token_id = pad_token_id
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


@pytest.fixture
def reward_dir(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Path:
    """A random reward model of the words w0, w1, ... as a directory."""
    classifier(architecture).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


# ----- the loss


def test_loss_and_gradient_by_hand() -> None:
    chosen = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([0.0, 0.25], dtype=torch.float64)
    losses = preference_loss(chosen, rejected, margin, centering_coef=0.01)
    # log(1 + e^-1) + 0.01 * 1^2 and log(1 + e^0.75) + 0.01 * 0.5^2
    assert losses.tolist() == pytest.approx([0.3132616875 + 0.01, 1.1368710061 + 0.0025])
    losses.sum().backward()
    # -sigmoid(-1) + 0.02 * 1 and -sigmoid(0.75) + 0.02 * 0.5; the other with the sigmoid's + sign
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.2689414214 + 0.02, -0.6791786992 + 0.01])
    assert rejected.grad.tolist() == pytest.approx([0.2689414214 + 0.02, 0.6791786992 + 0.01])


def test_loss_of_far_scores_is_finite() -> None:
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = preference_loss(chosen, torch.zeros(2), torch.zeros(2), centering_coef=0.0)
    assert losses.tolist() == [1e4, 0.0]
    losses.sum().backward()
    assert chosen.grad is not None and chosen.grad.tolist() == [-1.0, 0.0]


def test_metrics_are_means_over_pairs_not_batches() -> None:
    metrics = PairMetrics()
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 1.0])
    losses = torch.tensor([0.5, 1.0, 2.5, 0.0])
    for rows in (slice(0, 3), slice(3, 4)):  # 3 pairs, then 1
        metrics.update(losses[rows], chosen[rows], rejected[rows])
    values = {name: value.item() for name, value in metrics.flush().items()}
    # Gaps 1, 0 (no success), -3, 4.
    assert values == {"loss": 1.0, "accuracy": 0.5, "score_gap": 0.5, "mean_score": 14 / 8}
    metrics.update(losses[:1], chosen[:1], rejected[:1])
    assert metrics.flush()["accuracy"].item() == 1.0  # flushed means start anew


# ----- texts


TURNS = "\n\nHuman: Hi\n\nAssistant: Hello. \n\nHuman:  How?\n\nAssistant:"


def test_prompts_become_messages() -> None:
    assert as_messages("Hi\n\nHuman: no") == [{"role": "user", "content": "Hi\n\nHuman: no"}]
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "How?")]
    expected = [{"role": role, "content": content} for role, content in turns]
    assert as_messages(TURNS) == expected
    assert as_messages(TURNS.removesuffix("\n\nAssistant:")) == expected
    assert as_messages([{**message, "extra": "x"} for message in expected]) == expected


@pytest.mark.parametrize(
    "prompt",
    [None, 3, [], ["Hi"], [{"role": "user"}], [{"role": "user", "content": None}], {"role": "a"}],
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt=.* is neither text nor messages"):
        as_messages(prompt)


content = st.text().map(str.strip).filter(lambda text: "\n\n" not in text)


@given(st.lists(st.tuples(content, content.filter(bool)), min_size=1, max_size=3), content)
def test_a_transcript_is_read_as_it_is_written(turns: list[tuple[str, str]], last: str) -> None:
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": last})
    speakers = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{speakers[m['role']]}: {m['content']}" for m in messages)
    assert as_messages(text) == messages


def words(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


@pytest.fixture(scope="module")
def speaker_tokenizer() -> PreTrainedTokenizerBase:
    """Knows the words of the synthetic pairs."""
    fields = dict(ARCHITECTURE)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return word_tokenizer([*synthetic_vocabulary(), "System:"], config)


def test_without_a_template_a_text_is_a_transcript_with_an_end(
    speaker_tokenizer: PreTrainedTokenizerBase,
) -> None:
    system = [{"role": "system", "content": " chess\n"}, {"role": "user", "content": "bread "}]
    prompts = ["bread", "\n\nHuman: bread\n\nAssistant: rain\n\nHuman: stars\n\nAssistant:", system]
    rows = encode(speaker_tokenizer, prompts, [" thanks\n", "", "thanks <eos>"])
    assert [words(row, speaker_tokenizer) for row in rows] == [
        "Human: bread Assistant: thanks <eos>",
        "Human: bread Assistant: rain Human: stars Assistant: <eos>",
        "System: chess Human: bread Assistant: thanks <unk> <unk> <eos>",  # it stays text
    ]
    assert encode(speaker_tokenizer, [], []) == []


def test_the_chat_template_is_used_as_it_is(speaker_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(speaker_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }} {{ '<eos> ' if m.role == 'user' else 'cheers ' }}{% endfor %}"
    )
    (row,) = encode(tokenizer, [TURNS.replace("How?", "bread")], ["stars"])
    assert words(row, tokenizer) == "<unk> <eos> <unk> cheers bread <eos> stars cheers"  # no end
    with pytest.raises(ValueError, match=r"roles system user assistant .*no system"):
        encode(tokenizer, [[{"role": "system", "content": "a"}, *as_messages("b")]], ["c"])


@pytest.mark.parametrize("response", ["\ud800", "\x00", "<pad> <eos> <unk>", "a" * 10_000, "\n\n"])
def test_any_response_can_be_scored_or_is_nan(reward_dir: Path, response: str) -> None:
    scorer = RewardModelScorer(str(reward_dir))
    hostile, usual = scorer.score(["w1", "w1"], [response, "w2"])
    assert math.isfinite(hostile)
    assert usual == pytest.approx(scorer.score(["w1"], ["w2"])[0], rel=1e-5)


# ----- padding


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_token_id", [0, 1])  # 1 is the end token
def test_padding_does_not_change_a_score(
    architectures: dict[str, dict[str, Any]], model_type: str, pad_token_id: int
) -> None:
    model = classifier(architectures[model_type], pad_token_id)
    # With an end inside, at the end, both, of one token, and of end tokens alone.
    rows = [[5, 1, 6, 7], [5, 6, 7, 8, 9, 10, 1], [5, 1, 6, 1], [9], [1, 1]]
    together = scalar_scores(model, *pad(rows, pad_token_id))
    alone = torch.cat([scalar_scores(model, *pad([row], pad_token_id)) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({round(score, 4) for score in alone.tolist()}) == len(rows)

    # The score is read at the last token, or the last that is no end where that is the padding.
    hidden = model.base_model(torch.tensor([rows[2]])).last_hidden_state
    at = 3 if pad_token_id == 0 else 2
    torch.testing.assert_close(alone[2], model.score(hidden)[0, at, 0], rtol=1e-4, atol=1e-5)


# ----- pairs


MESSAGES = [{"role": "user", "content": "Hi"}]


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": MESSAGES, "chosen": "a", "rejected": "b", "margin": None, "other": 3},
        {"prompt": "other", "chosen": [*MESSAGES, reply("a")], "rejected": [*MESSAGES, reply("b")]},
        {"prompt": MESSAGES, "chosen": [reply("a")], "rejected": [reply("b")]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
    ],
)
def test_every_form_of_a_row_is_read(row: dict[str, Any]) -> None:
    assert read_pair(row, "here") == Pair(MESSAGES, "a", "b")
    assert read_pair({**row, "margin": 2}, "here") == Pair(MESSAGES, "a", "b", 2.0)


def test_a_transcript_is_split_at_its_last_response() -> None:
    pair = read_pair({"chosen": TURNS + " a", "rejected": TURNS + " b"}, "here")
    assert pair == Pair(as_messages(TURNS), "a", "b")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "a"},
        {"chosen": TURNS + " a", "rejected": TURNS.replace("Hello", "Bye") + " b"},
        {"chosen": [*MESSAGES, reply("a")], "rejected": [reply("x"), reply("b")]},
    ],
)
def test_a_row_without_a_difference_to_learn_is_no_pair(row: dict[str, Any]) -> None:
    assert read_pair(row, "here") is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "chosen=None is neither"),
        ({"prompt": "Hi", "chosen": "a"}, "rejected=None is neither"),
        ({"prompt": "Hi", "chosen": "a", "rejected": 3}, "rejected=3 is neither"),
        ({"chosen": "a", "rejected": "b"}, "chosen='a' has no prompt"),
        ({"chosen": "\n\nHuman: a", "rejected": "b"}, "chosen=.* has no prompt"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt=3 is neither"),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "chosen ends with .* 'user'"),
        ({"chosen": [reply("a")], "rejected": [reply("b")]}, "prompt=None is neither"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": -1}, "margin='-1'"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": math.nan}, "margin='nan'"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": True}, "margin='True'"),
    ],
)
def test_other_rows_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {said}"):
        read_pair(row, "here")


def test_jsonl_is_read_and_what_is_left_out_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "ab"[i % 2]} for i in range(5)]
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert [pair.prompt[0]["content"] for pair in load_pairs(str(file))] == ["p1", "p3"]  # type: ignore[index]
    assert "left out 3 pairs" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('\n{"prompt": "p"}', r":2: chosen=None"),
        ("{", ":1: the line is not JSON"),
        ("[" * 100_000, ":1: the line is not JSON"),
        ("[]", ":1: the line is no object"),
        ("", "holds no pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file}{said}" if said[0] == ":" else said):
        load_pairs(str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source=.* cannot be read \(No such file"):
        load_pairs(str(tmp_path / "none.jsonl"))


def test_parquet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = str(tmp_path / "pairs.parquet")
    sides = {"chosen": [[*MESSAGES, reply("a")]], "rejected": [[*MESSAGES, reply("b")]]}
    datasets.Dataset.from_dict({**sides, "prompt": ["Hi"], "score": [1.0]}).to_parquet(file)
    assert load_pairs(file) == [Pair(MESSAGES, "a", "b")]
    with pytest.raises(ValueError, match=r"data\.source=.*none\.parquet .* could not be loaded"):
        load_pairs(str(tmp_path / "none.parquet"))


def test_a_name_is_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    row = {"chosen": TURNS + " a", "rejected": TURNS + " b"}

    def load(name: str, split: str) -> list[dict[str, str]]:
        if name != "some/name":
            raise ConnectionError("no way\nto the hub")
        return [row, {}] if split == "bad" else [row]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_pairs("some/name", "test") == [Pair(as_messages(TURNS), "a", "b")]
    with pytest.raises(ValueError, match=r"some/name: row 1: chosen=None"):
        load_pairs("some/name", "bad")
    with pytest.raises(ValueError, match=r"data\.source=other/name \(split train\).*no way"):
        load_pairs("other/name")


# ----- synthetic pairs


TOPICS = {
    *("bread", "rain", "trains", "gardens", "music", "rivers", "clocks", "horses"),
    *("bridges", "coffee", "stars", "boats", "markets", "winter", "chess", "islands"),
}
COURTEOUS = {"thanks", "welcome", "gladly", "cheers"}


def test_synthetic_pairs_obey_their_rule() -> None:
    def good(prompt: str, response: str) -> tuple[bool, bool]:
        (asked,) = TOPICS & set(prompt.split())
        (named,) = TOPICS & set(response.split())
        return asked == named, response.split()[-1] in COURTEOUS

    faults = []
    known = set(synthetic_vocabulary())
    for index in range(600):
        pair = synthetic_pair(index, seed=3)
        assert pair.prompt == synthetic_prompt(index, seed=3)
        assert isinstance(pair.prompt, str)
        assert good(pair.prompt, pair.chosen) == (True, True)
        faults.append(good(pair.prompt, pair.rejected))
        assert set(f"{pair.prompt} {pair.chosen} {pair.rejected}".split()) <= known
        assert pair == synthetic_pair(index, seed=3)
    assert (True, True) not in faults
    for fault in ((True, False), (False, True), (False, False)):
        assert 150 < faults.count(fault) < 250  # 200, and 4 standard deviations
    others = [synthetic_pair(index, seed=4) for index in range(600)]
    assert sum(synthetic_pair(i, seed=3) == other for i, other in enumerate(others)) < 10
    assert all(synthetic_prompt(i, 3).startswith("\n\nHuman: ") for i in range(9))


# ----- batches


def numbered(sizes: Sequence[int]) -> list[Pair]:
    """``sizes[i]`` pairs of prompt i."""
    return [Pair(f"p{i}", f"a{j}", f"b{j}") for i, size in enumerate(sizes) for j in range(size)]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.integers(1, 10), st.integers(0, 3))
def test_no_prompt_is_in_both_parts(sizes: list[int], val_size: int, seed: int) -> None:
    pairs = numbered(sizes)
    train, val = split_by_prompt(pairs, val_size, seed)
    assert sorted(map(repr, train + val)) == sorted(map(repr, pairs))
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in val}
    assert min(val_size, len(pairs)) <= len(val) < val_size + 3
    assert (train, val) == split_by_prompt(pairs, val_size, seed)


def test_the_seed_chooses_the_validation_pairs() -> None:
    pairs = numbered([1] * 50)
    parts = [split_by_prompt(pairs, 10, seed)[1] for seed in range(3)]
    assert parts[0] != parts[1] != parts[2] != parts[0]
    # The same prompt in two forms is one prompt.
    same = [Pair("p", "a", "b"), Pair([{"role": "user", "content": "p"}], "c", "d")]
    assert split_by_prompt(same, 1, 0) == ([], same)


class World:
    """Stands in for a trainer."""

    def __init__(self, rank: int = 0, ranks: int = 1, epoch: int = 0) -> None:
        self.global_rank, self.world_size, self.current_epoch = rank, ranks, epoch


def jsonl_data(file: Path, rows: int, **options: Any) -> PreferencePairs:
    """Pairs ``wi`` -> ``wi`` or ``w0``, so that a text says which pair it is."""
    pairs = [
        {"prompt": f"w{i}", "chosen": f"w{i} " * (1 + i % 3), "rejected": "w0", "margin": i}
        for i in range(1, rows + 1)
    ]
    file.write_text("\n".join(map(json.dumps, pairs)))
    data = PreferencePairs(source=str(file), **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_batch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, ranks: int
) -> None:
    data = jsonl_data(tmp_path / "pairs.jsonl", 17, batch_size=5, val_size=6)
    data.encode(tokenizer, pad_token_id=0)

    def batches(name: str, ranks: int) -> list[list[PairBatch]]:
        """Each batch as its parts by rank."""
        loaders = []
        for rank in range(ranks):
            data.trainer = World(rank, ranks)  # type: ignore[assignment]
            loaders.append(getattr(data, f"{name}_dataloader")())
        assert len({len(loader) for loader in loaders}) == 1
        parts = list(zip(*loaders, strict=True))
        assert len(parts) == len(loaders[0])
        return [list(part) for part in parts]

    def rows(parts: list[list[PairBatch]]) -> list[float]:
        return [number for batch in parts for part in batch for number in part.margin.tolist()]

    expected = {1: [5, 5, 1], 2: [5, 6], 3: [5, 6]}  # each rank has a pair of every batch
    for name, sizes in (("train", expected[ranks]), ("val", [5, 1] if ranks == 1 else [6])):
        parts = batches(name, ranks)
        for batch, total in zip(parts, sizes, strict=True):
            shares = [len(part.margin) for part in batch]
            assert sum(shares) == total and max(shares) - min(shares) <= 1
            assert {part.total_pairs for part in batch} == {total}
        assert rows(parts) == rows(batches(name, 1))
        assert len(set(rows(parts))) == {"train": 11, "val": 6}[name]


def test_a_batch_holds_the_chosen_texts_then_the_rejected(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = jsonl_data(tmp_path / "pairs.jsonl", 9, batch_size=4, val_size=2)
    data.encode(tokenizer, pad_token_id=0)
    (batch,) = data.val_dataloader()
    numbers = [int(margin) for margin in batch.margin]
    chosen = [f"Human: w{i} Assistant: {f'w{i} ' * (1 + i % 3)}<eos>" for i in numbers]
    rejected = [f"Human: w{i} Assistant: w0 <eos>" for i in numbers]
    expected = [tokenizer(text)["input_ids"] for text in chosen + rejected]
    for row, ids in enumerate(expected):
        assert batch.input_ids[row, : len(ids)].tolist() == ids
        assert batch.attention_mask[row].tolist() == [
            int(place < len(ids)) for place in range(batch.input_ids.shape[1])
        ]
    assert len(expected) == len(batch.input_ids)


def test_every_epoch_has_another_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = jsonl_data(tmp_path / "pairs.jsonl", 30, batch_size=30, val_size=2)
    data.encode(tokenizer, pad_token_id=0)

    def order(loader: Callable[[], Any], epoch: int) -> list[float]:
        data.trainer = World(epoch=epoch)  # type: ignore[assignment]
        (batch,) = loader()
        return list(batch.margin.tolist())

    first, second = (order(data.train_dataloader, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) and first != second and sorted(first) != first
    assert order(data.train_dataloader, 0) == first
    assert order(data.val_dataloader, 0) == order(data.val_dataloader, 1)


def test_too_long_pairs_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    # Human: wi Assistant: wi <eos> are 5 tokens, and up to two more.
    data = jsonl_data(tmp_path / "pairs.jsonl", 30, batch_size=30, val_size=15, max_length=6)
    caplog.set_level(logging.WARNING)
    data.encode(tokenizer, pad_token_id=0)
    (train,), (val,) = data.train_dataloader(), data.val_dataloader()
    kept = sorted(train.margin.tolist() + val.margin.tolist())
    assert kept == [i for i in range(1, 31) if i % 3 != 2]
    counts = [int(record.getMessage().split()[2]) for record in caplog.records]
    assert sum(counts) == 10 and "longer than data.max_length=6" in caplog.text
    data.max_length = 4
    assert len(val.margin) == 15  # as many as are asked for, of those that are short enough
    with pytest.raises(ValueError, match=r"data\.max_length=4 is too short for all 30 pairs"):
        data.encode(tokenizer, pad_token_id=0)


def test_data_that_cannot_work_is_refused(tmp_path: Path) -> None:
    for name in ("synthetic_size", "batch_size", "max_length", "val_size"):
        with pytest.raises(ValueError, match=f"data.{name}=0 must be at least 1"):
            PreferencePairs(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.val_size=9 leaves none of 5 pairs"):
        jsonl_data(tmp_path / "pairs.jsonl", 5, val_size=9)
    with pytest.raises(ValueError, match="no closed vocabulary"):
        PreferencePairs(source="x.jsonl").vocabulary()


# ----- training


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RewardModelModule, PreferencePairs, dict[str, float]]:
    """A tiny reward model trained on synthetic pairs; tests only read it."""
    seed_everything(1, verbose=False)
    output = tmp_path_factory.mktemp("trained") / "new" / "model"
    module = RewardModelModule(str(output), PolicyArgs(architecture=ARCHITECTURE), lr=2e-3)
    data = PreferencePairs(synthetic_size=3200, batch_size=32, max_length=64, val_size=256)
    trainer = fit(module, data, max_epochs=3)
    return module, data, {k: float(v) for k, v in trainer.callback_metrics.items()}


Trained = tuple[RewardModelModule, PreferencePairs, dict[str, float]]


def scores_of_module(module: RewardModelModule, texts: Sequence[tuple[Any, str]]) -> Tensor:
    rows = encode(module.tokenizer, [p for p, _ in texts], [r for _, r in texts])
    with torch.no_grad():
        return scalar_scores(module.model, *pad(rows, int(module.tokenizer.pad_token_id)))


def test_a_tiny_reward_model_learns_the_rule(trained: Trained) -> None:
    _, _, logged = trained
    names = ("loss", "accuracy", "score_gap", "mean_score")
    assert set(logged) == {f"{split}/{name}" for split in ("reward", "val") for name in names}
    assert logged["val/accuracy"] > 0.95
    assert logged["val/score_gap"] > 2.0 and logged["val/loss"] < 0.2
    assert abs(logged["val/mean_score"]) < 1.0  # centred


def test_the_logged_numbers_are_those_of_the_validation_pairs(trained: Trained) -> None:
    module, data, logged = trained
    pairs = data.pairs["val"]
    chosen = scores_of_module(module, [(pair.prompt, pair.chosen) for pair in pairs])
    rejected = scores_of_module(module, [(pair.prompt, pair.rejected) for pair in pairs])
    assert len(pairs) % data.batch_size  # the last batch is smaller
    accuracy = sum(c > r for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True))
    assert logged["val/accuracy"] == pytest.approx(accuracy / len(pairs))
    assert logged["val/score_gap"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)


def test_the_saved_model_gives_the_same_scores(trained: Trained) -> None:
    module, data, _ = trained
    texts = [(pair.prompt, pair.chosen) for pair in data.pairs["val"][:20]]
    expected = scores_of_module(module, texts)
    directory = Path(module.output_dir)
    assert [path.name for path in directory.parent.iterdir()] == ["model"]  # nothing half-written

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert tokenizer.padding_side == "right"  # else models of absolute positions score otherwise
    # As anyone would use it, without this package's functions.
    rendered = [f"{prompt} {response} {tokenizer.eos_token}" for prompt, response in texts]
    inputs = tokenizer(rendered, padding=True, return_tensors="pt")
    with torch.no_grad():
        loaded = model(**inputs).logits.squeeze(-1)
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)

    scores = RewardModelScorer(str(directory), batch_size=7).score(*zip(*texts, strict=True))
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-5)


def test_a_training_that_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    module = RewardModelModule(str(tmp_path / "model"), PolicyArgs(architecture=SMALL))
    with pytest.raises(ValueError, match=r"model\.output_dir=.* already exists"):
        fit(module, PreferencePairs(synthetic_size=20, val_size=4), max_epochs=1)
    with pytest.raises(ValueError, match=r"data\.max_length=65 exceeds .* 64 tokens"):
        module = RewardModelModule(str(tmp_path / "new"), PolicyArgs(architecture=SMALL))
        data = PreferencePairs(synthetic_size=20, val_size=4, max_length=65)
        fit(module, data, max_epochs=1)
    for option in ({"lr": 0.0}, {"centering_coef": -1.0}, {"centering_coef": math.nan}):
        with pytest.raises(ValueError, match=f"model.{next(iter(option))}="):
            RewardModelModule("x", **option)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_language_model_gets_a_head(
    architectures: dict[str, dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    model_type: str,
) -> None:
    fields = architectures[model_type]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    language_model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    language_model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    data = jsonl_data(tmp_path / "pairs.jsonl", 12, batch_size=4, val_size=4, max_length=32)
    module = RewardModelModule(str(tmp_path / "rm"), PolicyArgs(model=str(tmp_path / "lm")), lr=0.1)
    fit(module, data, max_epochs=1)

    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    assert all(dropout.p == 0.0 for dropout in dropouts)
    assert dropouts or model_type == "llama"
    trunk = dict(module.model.base_model.named_parameters())
    before = dict(language_model.base_model.named_parameters())
    assert trunk.keys() == before.keys()
    # The same trunk, trained with steps of at most lr = 0.1: another one would lie far off.
    moved = [(trunk[name] - before[name].float()).abs().max() for name in trunk]
    assert 0.0 < max(moved) < 0.4
    assert len(RewardModelScorer(str(tmp_path / "rm")).score(["w1"], ["w2"])) == 1

    again = RewardModelModule(
        str(tmp_path / "again"), PolicyArgs(model=str(tmp_path / "rm")), lr=1e-9
    )
    fit(again, data, max_epochs=1)  # a classifier goes on with its own head
    torch.testing.assert_close(again.model.score.weight, module.model.score.weight)


def test_hyperparameters_and_weights_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    module = RewardModelModule(str(tmp_path / "rm"), PolicyArgs(architecture=SMALL), lr=1e-3)
    data = PreferencePairs(synthetic_size=40, batch_size=16, max_length=64, val_size=8)
    trainer = fit(module, data, max_epochs=1, default_root_dir=str(tmp_path))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    restored = RewardModelModule(
        **torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    )
    assert restored.policy_args == module.policy_args and restored.lr == 1e-3
    restored.output_dir = str(tmp_path / "other")
    seed_everything(2, verbose=False)
    # Nothing is left to train.
    fit(restored, data, max_epochs=1, ckpt_path=str(tmp_path / "x.ckpt"))
    for name, weight in module.state_dict().items():
        assert restored.state_dict()[name].equal(weight), name


def train(devices: int, directory: Path) -> None:
    """A short training on so many processes; leaves its weights and numbers."""
    seed_everything(1, verbose=False)
    module = RewardModelModule(
        str(directory / "model"), PolicyArgs(architecture=SMALL), lr=0.01, centering_coef=0.1
    )
    data = PreferencePairs(synthetic_size=51, batch_size=5, max_length=64, val_size=11)
    strategy = "ddp" if devices > 1 else "auto"
    options = {"devices": devices, "strategy": strategy, "precision": "64-true"}
    trainer = fit(module, data, max_epochs=2, **options)
    if trainer.is_global_zero:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save((module.state_dict(), numbers), directory / "end.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train(1, one)
    codes, printed = runs.ranks(lambda rank: train(2, two))
    assert codes == [0, 0], printed[-3000:]
    (weights, numbers), (other_weights, other_numbers) = (
        torch.load(directory / "end.pt", weights_only=True) for directory in (one, two)
    )
    # A batch of 5 pairs is 2 on one process and 3 on the other.
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-6, atol=1e-8)
    assert other_numbers == pytest.approx(numbers, rel=1e-5)
    assert (two / "model" / "model.safetensors").exists()


# ----- scoring in this process


def test_scores_keep_their_order(reward_dir: Path) -> None:
    lengths = [3, 9, 1, 5, 9, 2, 7]
    prompts = [f"w{i}" for i in range(7)]
    responses = [f"w{i + 9} " * n for i, n in enumerate(lengths)]
    scorer = RewardModelScorer(str(reward_dir), batch_size=2)
    scores = scorer.score(prompts, responses)
    alone = [scorer.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert scores == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 7
    assert scorer.score([], []) == []
    with pytest.raises(ValueError, match="1 prompts and 2 responses"):
        scorer.score(["w1"], ["w2", "w3"])


def test_what_cannot_be_scored_is_nan_and_nothing_else(reward_dir: Path) -> None:
    # <unk> w1 <unk> w2 <eos> are 5 tokens.
    scorer = RewardModelScorer(str(reward_dir), max_length=5)
    expected = scorer.score(["w1"], ["w2"])[0]
    scores = scorer.score(["w1"] * 4, ["w2", "w2 w2", "w3", "w2"])
    assert math.isnan(scores[1]) and [scores[0], scores[3]] == pytest.approx([expected] * 2)
    bad = scorer.tokenizer.convert_tokens_to_ids("w3")
    for value in (math.nan, math.inf):
        with torch.no_grad():
            scorer.model.get_input_embeddings().weight[bad] = value
        scores = scorer.score(["w1"] * 4, ["w2", "w2 w2", "w3", "w2"])
        assert [math.isnan(score) for score in scores] == [False, True, True, False]
        assert [scores[0], scores[3]] == pytest.approx([expected] * 2)
    head = scorer.model.score.weight
    with torch.no_grad():
        head.copy_(torch.zeros_like(head))
        head[0, 0] = math.inf
    assert math.isnan(scorer.score(["w1"], ["w2"])[0])  # and not infinite


def test_the_context_bounds_a_text(reward_dir: Path) -> None:
    scorer = RewardModelScorer(str(reward_dir))  # 128 positions
    fits, too_long = scorer.score(["w1"] * 2, ["w2 " * 124, "w2 " * 125])
    assert math.isfinite(fits) and math.isnan(too_long)


def test_no_checkpoint_holds_the_scorer_and_nothing_trains_it(reward_dir: Path) -> None:
    scorer = RewardModelScorer(str(reward_dir))

    class Holder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scorer = scorer

    scorer.score(["w1"], ["w2"])
    holder = Holder()
    assert not holder.state_dict() and not list(holder.parameters())
    assert not scorer.model.training
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_scores_do_not_depend_on_where_the_trainer_stands(reward_dir: Path) -> None:
    expected = RewardModelScorer(str(reward_dir)).score(["w1"], ["w2 w3"])
    scorer = RewardModelScorer(str(reward_dir))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # a validation
        assert scorer.score(["w1"], ["w2 w3"]) == expected
    # What is made in inference mode cannot be changed outside.
    tensors = [*scorer.model.parameters(), *scorer.model.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert scorer.to("cpu").score(["w1"], ["w2 w3"]) == expected


def test_a_lower_precision_is_close(reward_dir: Path) -> None:
    exact = RewardModelScorer(str(reward_dir)).score(["w1"], ["w2 w3"])
    scorer = RewardModelScorer(str(reward_dir), dtype="bfloat16")
    (rough,) = scorer.score(["w1"], ["w2 w3"])
    assert scorer.model.dtype == torch.bfloat16
    assert [rough] == pytest.approx(exact, rel=0.2, abs=0.2) and [rough] != exact


def test_a_model_without_a_padding_token_gets_the_tokenizers(reward_dir: Path) -> None:
    texts = (["w1", "w2"], ["w3 w4 w5", "w6"])
    expected = RewardModelScorer(str(reward_dir)).score(*texts)
    config = json.loads((reward_dir / "config.json").read_text())
    config["pad_token_id"] = None
    (reward_dir / "config.json").write_text(json.dumps(config))
    assert RewardModelScorer(str(reward_dir)).score(*texts) == expected


def test_what_is_no_reward_model_is_refused(model_dir: Path, reward_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.model=.* has 2 labels"):
        RewardModelScorer(str(model_dir))
    with pytest.raises(ValueError, match=r"reward\.model=.*none could not be loaded"):
        RewardModelScorer(str(reward_dir / "none"))
    with pytest.raises(ValueError, match=r"reward\.dtype=int8"):
        RewardModelScorer(str(reward_dir), dtype="int8")  # type: ignore[arg-type]
    for option in ("batch_size", "max_length"):
        with pytest.raises(ValueError, match=f"reward.{option}=0 must be at least 1"):
            RewardModelScorer(str(reward_dir), **{option: 0})  # type: ignore[arg-type]
    # A language model whose configuration says one label would get a random head.
    (reward_dir / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"has no weights for score\.weight"):
        RewardModelScorer(str(reward_dir)).score(["w1"], ["w2"])
