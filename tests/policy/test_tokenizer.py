"""Tokenizers that fit a model, and those that do not: no id leads out of a table."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedTokenizerBase

import runs
from tre_lightning.common.errors import Refused
from tre_lightning.policy.actor_critic import ActorCritic, PolicyArgs, load_language_model
from tre_lightning.policy.tokenizers import (
    check_known,
    check_same_words,
    check_special_tokens,
    unknown_word,
    word_tokenizer,
)
from tre_lightning.tasks.countdown.puzzles import PuzzleSpec

SIZE = 48
PUZZLES = runs.TINY["data"]["init_args"]["puzzles"]
CONFIG = AutoConfig.for_model(**runs.ARCHITECTURE)


def words(*names: str, size: int = SIZE) -> PreTrainedTokenizerBase:
    return word_tokenizer(names, AutoConfig.for_model("llama", vocab_size=size))


@pytest.fixture
def one_for_all() -> PreTrainedTokenizerBase:
    """Unknown, begin and end are one token, as GPT-2's."""
    tokenizer = words("a", "b")
    for kind in ("unk_token", "bos_token", "pad_token"):
        setattr(tokenizer, kind, tokenizer.eos_token)
    tokenizer.backend_tokenizer.model.unk_token = "<eos>"
    return tokenizer


# ----- words


def test_a_written_unknown_token_is_known(one_for_all: PreTrainedTokenizerBase) -> None:
    assert unknown_word(words("a", "b"), "a <unk> b") is None
    assert unknown_word(words("a", "b"), "a c b") == "c"
    assert unknown_word(one_for_all, "<eos> a b <eos>") is None
    assert unknown_word(one_for_all, "<eos> a <pad> never") == "never"


def test_ids_in_the_table_are_known() -> None:
    tokenizer = words("a")
    check_known([0, SIZE - 1], tokenizer, SIZE, "its token")
    check_known([SIZE], tokenizer, None, "its token")
    check_known([], tokenizer, SIZE, "its token")
    message = r"its token '<unused5>' has the id 9, and the model knows 9 tokens \(0 to 8\)"
    with pytest.raises(Refused, match=message):
        check_known([3, 9], tokenizer, 9, "its token")


@pytest.mark.parametrize("kind", ["eos_token", "pad_token"])
def test_special_tokens_must_be_there_and_in_the_table(kind: str) -> None:
    tokenizer = words("a")
    check_special_tokens(tokenizer, SIZE, "t")
    setattr(tokenizer, kind, None)
    with pytest.raises(Refused, match=rf"t has no {kind}; set {kind} in its tokenizer_config"):
        check_special_tokens(tokenizer, SIZE, "t")
    tokenizer.add_special_tokens({kind: "[NEW]"})
    with pytest.raises(Refused, match=rf"t: its {kind} '\[NEW\]' has the id {SIZE}"):
        check_special_tokens(tokenizer, SIZE, "t")


def test_common_tokens_must_have_the_same_ids() -> None:
    check_same_words(words("a", "b"), words("a", "b"), "m")
    with pytest.raises(Refused, match=r"m reads other ids than the policy: 'a' is 4 there and 3"):
        check_same_words(words("a", "b"), words("b", "a"), "m")


# ----- whole commands


Change = Callable[[PreTrainedTokenizerBase], Any]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Writes a model of some tokens, with a tokenizer that is changed; its directory."""

    def save(name: str, change: Change = lambda _: None, size: int = SIZE) -> str:
        spec = {k: tuple(v) if isinstance(v, list) else v for k, v in PUZZLES.items()}
        task = runs.PlusCountdown(puzzles=PuzzleSpec(**spec), format="steps", instruct=False)
        architecture = {**runs.ARCHITECTURE, "vocab_size": size}
        tokenizer = word_tokenizer(task.vocabulary(), CONFIG)
        change(tokenizer)
        policy = load_language_model(PolicyArgs(architecture=architecture))
        ActorCritic(policy, None).save_pretrained(tmp_path / name, tokenizer)
        return str(tmp_path / name)

    return save


@pytest.fixture
def refused(tmp_path: Path, refusal: runs.Said) -> Callable[..., str]:
    """The line of error with which a run of this policy is refused, before anything is written."""

    def of(**policy: str) -> str:
        changes = {"model.policy": policy, "warm_start": None}
        line = refusal(runs.run, tmp_path / "run", changes=changes)
        assert not (tmp_path / "run").exists()
        return line

    return of


def template(text: str) -> Change:
    return lambda tokenizer: setattr(tokenizer, "chat_template", text)


TURN = "{% for message in messages %}START {{ message['content'] }} END {% endfor %}"


def one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("unk_token", "bos_token", "pad_token"):
        setattr(tokenizer, kind, tokenizer.eos_token)
    tokenizer.backend_tokenizer.model.unk_token = "<eos>"
    template(TURN.replace("START", "<eos>").replace("END", "<eos>"))(tokenizer)


@pytest.mark.parametrize(
    "change", [one_token, template(TURN.replace("START", "<unk>").replace("END", "<pad>"))]
)
def test_a_template_may_write_the_tokens_for_unknown_and_padding(
    change: Change, saved: Callable[..., str], tmp_path: Path
) -> None:
    policy = {"model": saved("model", change)}
    short = ("--trainer.max_epochs=1", "--data.init_args.iterations_per_epoch=1")
    cli = runs.run(tmp_path / "run", *short, changes={"model.policy": policy, "warm_start": None})
    batch = cli.datamodule._train_batch(0, 0)
    tokenizer = cli.model.tokenizer
    for ids, mask, text in zip(batch.prompt_ids, batch.prompt_mask, batch.texts, strict=True):
        # What the template writes is read, whatever id it has.
        assert mask.sum() == len(text.split())
        assert tokenizer.decode(ids[mask][:1]) == text.split()[0]


def test_a_template_of_other_words_is_named(saved: Callable[..., str], refused: runs.Said) -> None:
    line = refused(model=saved("model", template(TURN)))
    assert "does not know, 'START'; its chat template writes it" in line


def pad_added(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def end_added(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"eos_token": "[END]"})


def turn_added(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["[TURN]"], special_tokens=True)
    template(TURN.replace("START", "[TURN]").replace("END", "<eos>"))(tokenizer)


def no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token = None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (pad_added, r"model\.policy\.tokenizer=.*: its pad_token '\[PAD\]' has the id 48"),
        (end_added, r"model\.policy\.tokenizer=.*: its eos_token '\[END\]' has the id 48"),
        (turn_added, r"the prompt '.*: its token '\[TURN\]' has the id 48"),
        (no_end, r"model\.policy\.tokenizer=.* has no eos_token"),
    ],
)
def test_a_token_beyond_the_table_is_refused(
    change: Change, reason: str, saved: Callable[..., str], tmp_path: Path, refused: runs.Said
) -> None:
    assert re.match(f"error: {reason}", refused(model=saved("model", change)))


def test_a_demonstration_with_a_token_beyond_the_table_is_refused() -> None:
    spec = {k: tuple(v) if isinstance(v, list) else v for k, v in PUZZLES.items()}
    task = runs.PlusCountdown(puzzles=PuzzleSpec(**spec), format="steps", instruct=False)
    task.use(word_tokenizer(task.vocabulary(), CONFIG))
    shown = [task.demonstration(0, misleading=False)]
    asked, answered = task.demonstration_ids(shown)[0]
    task.vocabulary_size = max(answered)  # the largest id is one too large
    assert max(asked) <= max(answered)
    with pytest.raises(Refused, match=r"a demonstration: its token .* has the id"):
        task.demonstration_ids(shown)


def test_a_critic_of_fewer_or_other_tokens_is_refused(
    saved: Callable[..., str], tmp_path: Path, refused: runs.Said
) -> None:
    model = saved("model")
    small = saved("small", size=40)
    line = refused(model=model, critic_model=small)
    assert re.match(r"error: model\.policy\.critic_model=.*small: the policy's token .* 47", line)
    other = saved("other")
    words("b", "a", "+").save_pretrained(other)
    line = refused(model=model, critic_model=other)
    assert re.match(r"error: model\.policy\.critic_model=.*other reads other ids", line)


def test_a_critic_may_lack_what_is_no_token(saved: Callable[..., str], tmp_path: Path) -> None:
    # As Qwen2.5's tables of several sizes above one tokenizer.
    policy = {"model": saved("model", size=SIZE + 16), "critic_model": saved("critic")}
    flags = ("--trainer.max_epochs=1", "--model.evaluation.num_responses=1")
    cli = runs.run(tmp_path / "run", *flags, changes={"model.policy": policy, "warm_start": None})
    assert cli.model.iteration == 2
