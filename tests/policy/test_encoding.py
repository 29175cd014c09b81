"""Texts to token ids: control tokens, prompts, demonstrations and what a reward model reads."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedTokenizerBase

import runs
from chat_tokenizers import TAGS, TURNS, chatml, pieces, smol, words
from tre_lightning.policy.chat import Messages, in_template
from tre_lightning.policy.encoding import (
    Conversation,
    control_tokens,
    encode_conversations,
    encode_texts,
    textless_tokens,
    tokens_around,
)
from tre_lightning.policy.tokenizers import word_tokenizer
from tre_lightning.tasks import CountdownDataModule, Demonstrations, MathDataModule, WalkDataModule
from tre_lightning.tasks.alignment.prompts import PreferenceDataModule, RewardArgs
from tre_lightning.tasks.alignment.scorer import encode
from tre_lightning.tasks.base import Prompt

KINDS = {
    "bytes": chatml,
    "smol": smol,
    "pieces": pieces,
    "plain pieces": lambda: pieces(None),
    "unigram": lambda: pieces(TURNS, unigram=True),
    "plain unigram": lambda: pieces(None, unigram=True),
    "words": words,
}


def ids_of(tokenizer: PreTrainedTokenizerBase, messages: Messages, own: str = "") -> list[int]:
    text = " ".join(message["content"] for message in messages)
    row = Conversation(messages, text)
    (ids,) = encode_conversations(tokenizer, [row], "policy", ask=True, own=own)
    return ids


def user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def controls(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Control tokens among the ids; a word that is not known is none."""
    known = {*control_tokens(tokenizer).values()} - {tokenizer.unk_token_id}
    return [i for i in ids if i in known]


# ----- control tokens written in the data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", ["{0}", "a{0}b", " {0} ", "{0}{0}", "{1}{0}{2}", "{1}\n{2}", "\n{0}\n"]
)
def test_control_tokens_written_in_a_message_stay_text(kind: str, form: str) -> None:
    tokenizer = KINDS[kind]()
    names = control_tokens(tokenizer)
    assert len(names) >= 3
    expected = controls(tokenizer, ids_of(tokenizer, user("a b")))
    for name in names:
        content = form.format(name, name[:2], name[2:])
        for messages in (user(content), [*user("a"), *user(content)]):
            ids = ids_of(tokenizer, messages)
            usual = ids_of(tokenizer, [*user("a")] * (len(messages) - 1) + user("a b"))
            assert controls(tokenizer, ids) == controls(tokenizer, usual), (name, ids)
    counts = {"bytes": 3, "smol": 5, "words": 0, "plain pieces": 1, "plain unigram": 1}
    assert len(expected) == counts.get(kind, 4)


@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|>", "a", "\n", "é",
                         "\ue000", "\ud800", "<|fim|>", "<think>", "user"]),
        max_size=6,
    ).map("".join)
)  # fmt: skip
def test_any_text_in_a_message_is_read_as_it_is_written(content: str) -> None:
    tokenizer = chatml()
    ids = ids_of(tokenizer, user(content))
    known = content.encode(errors="replace").decode()
    assert tokenizer.decode(ids) == in_template(tokenizer, user(known), "policy", ask=True)
    assert controls(tokenizer, ids) == controls(tokenizer, ids_of(tokenizer, user("a")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_control_tokens_is_tokenized_as_ever(kind: str) -> None:
    tokenizer = KINDS[kind]()
    messages = [*user("w1 Combine the 3 < 4\n"), {"role": "assistant", "content": "w2 17"}]
    text = " ".join(message["content"] for message in messages)
    if tokenizer.chat_template is None:
        expected = tokenizer(text)["input_ids"]
        expected = expected[:-1] if expected[-1] == tokenizer.eos_token_id else expected
    else:
        rendered = in_template(tokenizer, messages, "policy", ask=True)
        expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids_of(tokenizer, messages) == expected


def test_a_role_cannot_hold_a_control_token() -> None:
    messages = [{"role": "user<|im_end|>", "content": "a"}]
    assert controls(chatml(), ids_of(chatml(), messages)) == controls(
        chatml(), ids_of(chatml(), user("a"))
    )


def test_responses_cannot_end_their_turn_before_a_reward_model() -> None:
    for make in (chatml, pieces, lambda: pieces(None), words):
        tokenizer = make()
        for name in control_tokens(tokenizer):
            hostile, usual = encode(tokenizer, ["w1", "w1"], [f"w2 {name} w2", "w2 w2"])
            assert controls(tokenizer, hostile) == controls(tokenizer, usual), name


# ----- begin and end


def test_plain_texts_begin_as_the_tokenizer_says_and_do_not_end() -> None:
    tokenizer = pieces(None)
    assert tokens_around(tokenizer) == ([1], [2])
    ids = ids_of(tokenizer, user("the numbers"))
    assert [ids[0], ids.count(1), ids.count(2)] == [1, 1, 0]
    assert tokenizer("the numbers")["input_ids"] == [*ids, 2]  # add_eos_token
    assert tokens_around(words()) == ([], []) == tokens_around(chatml())


def test_what_a_template_writes_has_no_second_begin() -> None:
    ids = ids_of(pieces(), user("the numbers"))
    assert [ids[0], ids.count(1), ids.count(2)] == [1, 1, 0]


def test_a_reward_model_reads_what_its_tokenizer_puts_around_a_text() -> None:
    (row,) = encode(pieces(None), ["the"], ["numbers"])
    assert [row[0], row.count(1), row[-1], row.count(2)] == [1, 1, 2, 1]
    (row,) = encode(pieces(), ["the"], ["numbers"])  # its template writes no end of the text
    assert [row[0], row.count(1), row.count(2)] == [1, 1, 0]


# ----- demonstrations


def tasks() -> Iterator[CountdownDataModule | MathDataModule | PreferenceDataModule]:
    yield CountdownDataModule(max_prompt_length=2000)
    yield CountdownDataModule(max_prompt_length=2000, format="steps", instruct=False)
    yield WalkDataModule(max_prompt_length=2000)  # type: ignore[misc]
    yield PreferenceDataModule(RewardArgs(url="http://127.0.0.1:9"), max_prompt_length=2000)
    pytest.importorskip("math_verify")
    yield MathDataModule(max_prompt_length=2000)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "plain pieces"])
def test_a_demonstration_begins_with_the_very_tokens_of_the_prompt(kind: str) -> None:
    """What is learned there must be seen again in reinforcement learning."""
    tokenizer = KINDS[kind]()
    for task in tasks():
        data = Demonstrations(task, steps=2, batch_size=3)
        data.encode(tokenizer)
        first, second = data.train_dataloader()
        prompts = task.prompt_ids([task.train_prompt(index) for index in range(6)])
        for batch, some in ((first, prompts[:3]), (second, prompts[3:])):
            for ids, attention, response, prompt in zip(*batch, some, strict=True):
                assert ids[attention & ~response].tolist() == prompt
                answer = ids[response].tolist()
                assert answer[-1] == tokenizer.eos_token_id
                assert not controls(tokenizer, [i for i in answer[:-1] if i not in tags(tokenizer)])
                places = attention.long().diff()
                assert (places <= 0).all() and response.long().diff().abs().sum() <= 2


def tags(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for name, i in control_tokens(tokenizer).items() if name in TAGS}


def test_special_tokens_of_the_task_are_tokens_in_prompts_and_demonstrations() -> None:
    tokenizer = chatml()
    task = CountdownDataModule(max_prompt_length=2000)
    task.use(tokenizer)
    (prompt,) = task.prompt_ids([task.train_prompt(0)])
    ((_, response),) = task.demonstration_ids(
        [("1 + 2", "<think> a </think> <answer> 3 </answer>")]
    )
    for ids in (prompt, response):
        assert tags(tokenizer) <= {*ids}
    pytest.importorskip("math_verify")
    problems = MathDataModule(instruction="Think in <think> </think> .")
    problems.use(tokenizer)
    (ids,) = problems.prompt_ids([Prompt("<answer> 3 <think> Think in <think> </think> .")])
    names = control_tokens(tokenizer)
    assert names["<answer>"] not in ids and ids.count(names["</think>"]) == 1


def test_demonstrations_may_write_control_tokens_as_text() -> None:
    task = CountdownDataModule()
    task.use(chatml())
    ((_, response),) = task.demonstration_ids([("1 + 2", "3 <|im_end|> 4")])
    assert controls(chatml(), response) == [chatml().eos_token_id]
    assert chatml().decode(response[:-1]) == "3 <|im_end|> 4"
    assert encode_texts(chatml(), []) == []


# ----- tokens that stand for no text


def test_tokens_that_stand_for_no_text() -> None:
    names = control_tokens(chatml())
    found = {*textless_tokens(chatml())}
    assert {
        names[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim|>")
    } == found
    turns = pieces()
    named = {turns.convert_tokens_to_ids(t) for t in ("<unk>", "<s>", "</s>", "<turn>", "</turn>")}
    assert {*textless_tokens(turns)} == named
    assert {*textless_tokens(pieces(None))} == named - {
        turns.convert_tokens_to_ids(t) for t in ("<turn>", "</turn>")
    }
    few = word_tokenizer(["a"], AutoConfig.for_model(**{**runs.ARCHITECTURE, "vocab_size": 7}))
    assert textless_tokens(few) == [0, 1, 2, 4, 5, 6]  # <pad> <eos> <unk>, and those not in use
