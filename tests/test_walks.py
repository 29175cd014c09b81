import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tre_lightning.data.walks import WalkDataModule, WalkSpec, all_ends, random_walk, reachable
from tre_lightning.rewards.walks import score_walk
from tre_lightning.rollout import PromptBatch

RIGHT = "#2 5 + 9 = 14 #1 14 + 3 = 17"
SMALL = WalkSpec(steps=2, largest_number=4, largest_step=2, largest_distance=4)


# ----- the scorer


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("", "empty"),
        ("#2 5 + 9 = 14", "a step is missing"),
        (RIGHT + " #0 17 + 1 = 18", "a step too many"),
        (RIGHT + " .", "a word too many"),
        ("#1 5 + 9 = 14 #2 14 + 3 = 17", "labels in a wrong order"),
        ("#2 5 + 9 = 15 #1 15 + 2 = 17", "5 + 9 is 14, though it ends at 17"),
        ("#2 6 + 8 = 14 #1 14 + 3 = 17", "starts elsewhere"),
        ("#2 5 + 8 = 13 #1 14 + 3 = 17", "goes on elsewhere"),
        ("#2 5 + 9 = 14 #1 14 + 4 = 18", "ends elsewhere"),
        ("#2 5 + 2 = 7 #1 7 + 10 = 17", "too large a step"),
        ("#2 5 + 12 = 17 #1 17 + 0 = 17", "a step of 0"),
        ("#2 5 + 9 = 14 #1 14 - -3 = 17", "a signed size"),
        ("#2 5 + 9 = 14 #1 14 + 03 = 17", "another spelling"),
        ("#2 5 + 9 = 14 #1 14 + \u0663 = 17", "a digit of another script"),
    ],
)
def test_only_right_walks_score(response: str, why: str) -> None:
    assert score_walk(RIGHT, 5, 17, 2) == 1.0
    assert score_walk(response, 5, 17, 2) == 0.0, why


def test_a_walk_may_go_down_and_spaces_do_not_matter() -> None:
    assert score_walk("#1 7 - 3 = 4", 7, 4, 1) == 1.0
    assert score_walk(" #1  7\n- 3 =\t4 ", 7, 4, 1) == 1.0
    assert score_walk("#1 3 - 7 = -4", 3, -4, 1) == 1.0
    assert score_walk("#1 7 - 3 = 4", 7, 4, 1, largest_step=2) == 0.0


@given(st.text(), st.integers(1, 3))
def test_any_text_has_a_score(text: str, steps: int) -> None:
    assert score_walk(text, 5, 17, steps) in (0.0, 1.0)


# ----- the walks


def test_reachable_numbers_by_hand() -> None:
    # numbers 0 to 4, steps of 1 or 2
    assert [*map(sorted, reachable(SMALL, 0))] == [[0], [1, 2], [0, 1, 2, 3, 4]]


def test_every_walk_is_drawn() -> None:
    drawn = {random_walk(SMALL, 0, 2, random.Random(seed)) for seed in range(50)}
    # 0 -> 1 -> 2 only: 0 -> 2 would have to stay
    assert drawn == {"#2 0 + 1 = 1 #1 1 + 1 = 2"}
    drawn = {random_walk(SMALL, 1, 2, random.Random(seed)) for seed in range(50)}
    assert drawn == {"#2 1 - 1 = 0 #1 0 + 2 = 2", "#2 1 + 2 = 3 #1 3 - 1 = 2"}


def test_no_walk_is_an_error() -> None:
    with pytest.raises(ValueError, match="leads from 0 to 4"):
        random_walk(replace(SMALL, steps=1), 0, 4, random.Random(0))


specs = st.builds(
    WalkSpec,
    steps=st.integers(2, 12),
    largest_number=st.just(20),
    largest_step=st.integers(2, 9),
    largest_distance=st.integers(6, 20),
)


@given(specs, st.integers(0, 10**6), st.integers(0, 10**6))
def test_demonstrations_are_right_unless_misleading(spec: WalkSpec, seed: int, index: int) -> None:
    data = WalkDataModule(spec, seed=seed, val_size=1, test_size=1)
    ends = data.train_prompt(index).extra["ends"]
    words = {*data.vocabulary()}
    for misleading in (False, True):
        prompt, response = data.demonstration(index, misleading)
        assert prompt == f"{ends[0]} to {ends[1]} in #{spec.steps} :"
        assert score_walk(response, *ends, spec.steps, spec.largest_step) == (not misleading)
        assert len(response.split()) == 6 * spec.steps
        assert {*prompt.split(), *response.split()} <= words
        # a misleading walk is sound all the same
        end = int(response.split()[-1])
        assert score_walk(response, ends[0], end, spec.steps, spec.largest_step) == 1.0


@given(specs, st.integers(0, 10**6), st.data())
def test_one_wrong_word_anywhere_spoils_a_walk(
    spec: WalkSpec, index: int, draw: st.DataObject
) -> None:
    data = WalkDataModule(spec, val_size=1, test_size=1)
    ends = data.train_prompt(index).extra["ends"]
    words = data.demonstration(index, False)[1].split()
    place = draw.draw(st.integers(0, len(words) - 1))
    others = [word for word in [*data.vocabulary(), "<unused7>"] if word != words[place]]
    words[place] = draw.draw(st.sampled_from(others))
    assert score_walk(" ".join(words), *ends, spec.steps, spec.largest_step) == 0.0


# ----- the data module


def test_splits_are_disjoint_and_alike_at_every_length() -> None:
    for steps in (2, 8, 21):
        ends = all_ends(WalkSpec(steps=steps))
        assert ends == all_ends(WalkSpec())
        assert {split: len(pairs) for split, pairs in ends.items()} == {
            "train": 470,
            "val": 174,
            "test": 161,
        }
        assert len(set().union(*ends.values())) == 470 + 174 + 161
        assert all(abs(start - target) <= 18 for pairs in ends.values() for start, target in pairs)


def test_prompts_are_a_function_of_seed_and_index() -> None:
    one, same, other = (WalkDataModule(seed=seed) for seed in (1, 1, 2))
    texts = [[data.train_prompt(i).text for i in range(20)] for data in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert one.demonstration(3, True) == same.demonstration(3, True) != one.demonstration(4, True)
    trained = {data.train_prompt(i).text for data in (one, other) for i in range(500)}
    for stage, size in (("val", 128), ("test", 128)):
        held_out = {prompt.text for prompt in one.heldout_prompts(stage)[stage]}
        assert len(held_out) == size and not held_out & trained
        assert one.heldout_prompts(stage) == other.heldout_prompts(stage)


def test_scores_follow_the_prompt_of_each_response() -> None:
    batch = PromptBatch(
        prompt_ids=torch.zeros(2, 1, dtype=torch.long),
        prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        texts=("5 to 17 in #2 :", "1 to 2 in #2 :"),
        extras=({"ends": (5, 17)}, {"ends": (1, 2)}),
        split="val",
        index=0,
        first_row=0,
        total_rows=2,
    )
    down = "#2 1 + 2 = 3 #1 3 - 1 = 2"
    scores = WalkDataModule().score([RIGHT, down, RIGHT, down], batch)
    assert scores.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("field", "value", "most"),
    [
        ("steps", 0, 999),
        ("largest_number", 100, 99),
        ("largest_step", 31, 30),
        ("largest_distance", 31, 30),
    ],
)
def test_spec_out_of_bounds(field: str, value: int, most: int) -> None:
    with pytest.raises(
        ValueError, match=f"data.walks.{field}={value}; use an int from 1 to {most}"
    ):
        WalkSpec(**{field: value})


def test_sizes_that_the_walks_cannot_give() -> None:
    with pytest.raises(ValueError, match=r"data\.test_size=162, but data.walks gives 161 test"):
        WalkDataModule(test_size=162)
    with pytest.raises(ValueError, match=r"data\.val_size=0 must be at least 1"):
        WalkDataModule(val_size=0)
    tiny = WalkSpec(steps=1, largest_number=1, largest_step=1, largest_distance=1)
    with pytest.raises(ValueError, match="prompt"):
        WalkDataModule(tiny)
