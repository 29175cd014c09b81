"""What a scorer may give, and the texts that it gets."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import runs
from chat_tokenizers import chatml
from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.common.errors import ScoreError
from tre_lightning.policy.encoding import control_tokens, textless_tokens
from tre_lightning.training.responses import invalid_responses, response_texts
from tre_lightning.training.task import scores_of


def scored(scores: Any, count: int = 3) -> list[float]:
    task: Any = SimpleNamespace(score=lambda responses, prompts: scores)
    prompts: Any = None
    found = scores_of(task, [f"response {i}" for i in range(count)], prompts)
    assert found.dtype == torch.float32
    return [float(score) for score in found]


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 0.0, 0.5],
        (1, 0, 0.5),
        np.array([1.0, 0.0, 0.5]),
        np.array([1.0, 0.0, 0.5], dtype=np.float16),
        [np.float32(1), np.int64(0), np.float64(0.5)],
        torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
        torch.tensor([1.0, 0.0, 0.5], requires_grad=True),
        [torch.tensor(1), torch.tensor(False), torch.tensor(0.5)],
        [True, False, 0.5],
        (score for score in (1, 0, 0.5)),
        {"a": 1, "b": 0, "c": 0.5}.values(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scores_in_any_container_are_taken(scores: Any) -> None:
    assert scored(scores) == [1.0, 0.0, 0.5]


def test_truth_values_and_ints_are_scores() -> None:
    for scores in (np.array([True, False]), torch.tensor([True, False]), torch.tensor([1, 0])):
        assert scored(scores, 2) == [1.0, 0.0]
    for one in (torch.tensor(0.5), np.array([0.5]), [0.5]):
        assert scored(one, 1) == [0.5]
    assert scored([], 0) == []


def test_none_and_nan_could_not_be_scored() -> None:
    for scores in ([None, 1, math.nan], np.array([None, 1, np.nan], dtype=object)):
        first, second, third = scored(scores)
        assert math.isnan(first) and second == 1.0 and math.isnan(third)


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 2.0],
        torch.zeros(2),
        torch.zeros(3, 1),
        torch.zeros(4),
        np.zeros((3, 2)),
        [[1.0, 2.0]] * 3,
        torch.zeros(3, dtype=torch.complex64),
        1.0,
        None,
        "111",
        ["1", "0", "1"],
        {"scores": [1, 2, 3]},
        {0: 1.0, 1: 1.0, 2: 1.0},
        [1.0, object(), 2.0],
        [math.inf, 1.0, 1.0],
        [1.0, 1e300, 1.0],
        [10**400, 1, 1],
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_scores_are_one_line(scores: Any) -> None:
    with pytest.raises(ScoreError, match=r"^the scorer gave ") as raised:
        scored(scores)
    assert "\n" not in str(raised.value)


class ListScores(runs.PlusCountdown):
    """Gives a list of Python objects; the first response of a batch is not scored."""

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        scores: list[Any] = [bool(score) for score in super().score(responses, prompts)]
        return [None, *scores[1:]]  # type: ignore[return-value]


def test_a_run_with_a_scorer_that_gives_a_list(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", changes={"data.class_path": "test_task.ListScores"})
    assert runs.saved_iteration(tmp_path / "run") == runs.ITERATIONS


def test_a_run_whose_tags_are_special_tokens(tmp_path: Path) -> None:
    """In a chat template; the warm start teaches what the scorer must then get to see."""
    chatml().save_pretrained(tmp_path / "tokenizer")
    size = {"vocab_size": len(chatml()), "max_position_embeddings": 512}
    changes = {
        "model.policy": {
            "architecture": {**runs.ARCHITECTURE, **size},
            "tokenizer": str(tmp_path / "tokenizer"),
        },
        "data.init_args.format": "think_answer",
        "data.init_args.instruct": True,
        "warm_start.steps": 25,
        "trainer.max_epochs": 1,
    }
    runs.run(tmp_path / "run", changes=changes)
    samples = [text for _, text in runs.texts(tmp_path / "run", "val/samples")]
    responses = [line for text in samples for line in text.split("\n\n") if line]
    assert samples and any("\n<think>" in response for response in responses)


# ----- the texts


def rollout(rows: Sequence[tuple[list[int], bool]]) -> Rollout:
    """Responses and whether they ended by themselves, padded with the token for padding."""
    fill, width = int(chatml().pad_token_id), max(len(ids) for ids, _ in rows)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    return Rollout(
        prompt_ids=torch.zeros(len(rows), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        response_ids=torch.tensor([ids + [fill] * (width - len(ids)) for ids, _ in rows]),
        response_mask=torch.arange(width) < lengths.unsqueeze(1),
        finished=torch.tensor([finished for _, finished in rows]),
    )


def ids_of(text: str) -> list[int]:
    return list(chatml()(text)["input_ids"])


def test_texts_lose_their_end_and_padding_and_nothing_else() -> None:
    """Special tokens are a part of what the model wrote."""
    answer = "<think>a</think><answer>3 + 4</answer>"
    rows = [
        (ids_of(answer + "<|im_end|>"), True),
        (ids_of(answer + "<|endoftext|>"), True),  # another token that ends a response
        (ids_of(answer), False),
        (ids_of("a<|fim|>b<|im_start|>"), False),
        (ids_of("<|endoftext|>a<|im_end|>"), True),  # padding where a word should be
        (ids_of("<|im_end|>"), True),
        ([], False),
    ]
    assert response_texts(rollout(rows), chatml()) == [
        answer,
        answer,
        answer,
        "a<|fim|>b<|im_start|>",
        "<|endoftext|>a",
        "",
        "",
    ]


def test_invalid_is_a_control_token_before_the_end() -> None:
    known = len(chatml()), textless_tokens(chatml())
    for text in ("a b", "<think>a</think>", "", "<answer>", "a" * 50):
        for end in ("<|im_end|>", "<|endoftext|>"):
            rows = rollout([(ids_of(text + end), True), (ids_of("a" * 60), False)])
            assert invalid_responses(rows, *known).tolist() == [False, False]
    for name in control_tokens(chatml()):
        expected = not name.strip("<>/").isalpha()  # a tag
        for text in (f"{name}a", f"a{name}b", f"a{name}"):
            rows = rollout([(ids_of(text), False), (ids_of(text + "<|im_end|>"), True)])
            assert invalid_responses(rows, *known).tolist() == [expected] * 2, text
    assert invalid_responses(rollout([([len(chatml())], False)]), *known).tolist() == [True]
