import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import batches
from tre_lightning.tasks.walks.prompts import (
    Walk,
    WalkDataModule,
    WalkSpec,
    random_steps,
    walk_split,
)
from tre_lightning.tasks.walks.scorer import score_walk

RIGHT = "#2 5 + 7 = 12 #1 12 - 3 = 9"
SMALL = WalkSpec(steps=2, largest_number=4, largest_size=2, sizes=1)


# ----- the scorer


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("", "empty"),
        ("#2 5 + 7 = 12", "a step is missing"),
        (RIGHT + " #0 9 + 3 = 12", "a step too many"),
        (RIGHT + " .", "a word too many"),
        ("#1 5 + 7 = 12 #2 12 - 3 = 9", "labels in a wrong order"),
        ("#2 5 + 7 = 13 #1 13 - 3 = 10", "5 + 7 is 12, though it goes on soundly"),
        ("#2 6 + 7 = 13 #1 13 - 3 = 10", "starts elsewhere"),
        ("#2 5 + 7 = 12 #1 13 - 3 = 10", "goes on elsewhere"),
        ("#2 5 + 7 = 12 #1 12 - 3 = 8", "a last result off by one"),
        ("#2 5 + 7 = 12 #1 12 - 4 = 8", "a size that was not given"),
        ("#2 5 + 7 = 12 #1 12 * 3 = 36", "another sign"),
        ("#2 5 + 7 = 12 #1 12 - 3 == 9", "another word for ="),
        ("#2 5 + 7 = 12 #1 12 - 03 = 9", "another spelling"),
        ("#2 5 + 7 = 12 #1 12 - \u0663 = 9", "a digit of another script"),
        ("#2 5 - -7 = 12 #1 12 - 3 = 9", "a signed size"),
    ],
)
def test_only_right_walks_score(response: str, why: str) -> None:
    assert score_walk(RIGHT, 5, (2, 3, 7), 2) == 1.0
    assert score_walk(response, 5, (2, 3, 7), 2) == 0.0, why


def test_any_given_size_and_any_spaces_will_do() -> None:
    assert score_walk("#1 7 - 3 = 4", 7, [3], 1) == 1.0
    assert score_walk(" #1  7\n+ 2 =\t9 ", 7, [2, 3], 1) == 1.0
    assert score_walk("#1 3 - 7 = -4", 3, [7], 1) == 1.0


@given(st.text(), st.integers(1, 3))
def test_any_text_has_a_score(text: str, steps: int) -> None:
    assert score_walk(text, 5, (2, 3, 7), steps) in (0.0, 1.0)


# ----- the walks


def test_every_walk_and_no_other_is_drawn() -> None:
    def drawn(start: int, stray: int | None = None) -> set[str]:
        rngs = map(random.Random, range(60))
        return {random_steps(SMALL, Walk(start, (2,)), rng, stray) for rng in rngs}

    # within 0 to 4, by 2
    assert drawn(1) == {"#2 1 + 2 = 3 #1 3 - 2 = 1"}
    assert drawn(0) == {"#2 0 + 2 = 2 #1 2 + 2 = 4", "#2 0 + 2 = 2 #1 2 - 2 = 0"}
    # one of the two by 1, the only other size
    assert drawn(0, stray=0) == {"#2 0 + 1 = 1 #1 1 + 2 = 3"}
    assert drawn(0, stray=1) == {"#2 0 + 2 = 2 #1 2 + 1 = 3", "#2 0 + 2 = 2 #1 2 - 1 = 1"}


specs = st.integers(2, 9).flatmap(
    lambda largest: st.builds(
        WalkSpec,
        steps=st.integers(1, 12),
        largest_number=st.integers(18, 40),
        largest_size=st.just(largest),
        sizes=st.integers(1, largest - 1),
    )
)


@given(specs, st.integers(0, 10**6), st.integers(0, 10**6))
def test_demonstrations_are_right_unless_misleading(spec: WalkSpec, seed: int, index: int) -> None:
    data = WalkDataModule(spec, seed=seed)
    walk = data.train_prompt(index).extra["walk"]
    assert len({*walk.sizes}) == spec.sizes and walk_split(walk) == "train"
    words = {*data.vocabulary()}
    for misleading in (False, True):
        prompt, response = data.demonstration(index, misleading)
        assert prompt == data.train_prompt(index)
        assert score_walk(response, walk.start, walk.sizes, spec.steps) == (not misleading)
        assert len(response.split()) == 6 * spec.steps
        assert {*prompt.text.split(), *response.split()} <= words
        # a misleading walk is sound all the same
        assert score_walk(response, walk.start, range(1, spec.largest_size + 1), spec.steps) == 1.0
        strays = [size for size in response.split()[3::6] if int(size) not in walk.sizes]
        assert len(strays) == misleading


@given(specs, st.integers(0, 10**6), st.data())
def test_one_wrong_word_anywhere_spoils_a_walk(
    spec: WalkSpec, index: int, draw: st.DataObject
) -> None:
    data = WalkDataModule(spec)
    walk = data.train_prompt(index).extra["walk"]
    words = data.demonstration(index, False)[1].split()
    place = draw.draw(st.integers(0, len(words) - 1))
    others = [word for word in [*data.vocabulary(), "<unused7>"] if word != words[place]]
    words[place] = draw.draw(st.sampled_from(others))
    assert score_walk(" ".join(words), walk.start, walk.sizes, spec.steps) == 0.0


# ----- the data module


def test_prompts_are_a_function_of_seed_and_index_alike_at_every_length() -> None:
    one, same, other = (WalkDataModule(seed=seed) for seed in (1, 1, 2))
    texts = [[data.train_prompt(i).text for i in range(20)] for data in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert one.demonstration(3, True) == same.demonstration(3, True) != one.demonstration(4, True)
    long = WalkDataModule(WalkSpec(steps=21), seed=1)
    assert long.train_prompt(3).text == one.train_prompt(3).text.replace("#2", "#21")
    assert long.train_prompt(3).extra == one.train_prompt(3).extra


def test_held_out_prompts_differ_and_are_not_trained_on() -> None:
    sets: dict[str, set[Walk]] = {}
    for seed in (1, 2):
        data = WalkDataModule(seed=seed, val_size=64, test_size=100)
        for stage, size in (("val", 64), ("test", 100)):
            walks = {prompt.extra["walk"] for prompt in data.heldout_prompts(stage)[stage]}
            assert len(walks) == size
            sets.setdefault(stage, set()).update(walks)
        sets.setdefault("train", set()).update(
            data.train_prompt(index).extra["walk"] for index in range(500)
        )
    assert all(walk_split(walk) == split for split, walks in sets.items() for walk in walks)


def test_scores_follow_the_prompt_of_each_response() -> None:
    batch = batches.prompt_batch(
        {"walk": Walk(5, (2, 3, 7))},
        {"walk": Walk(1, (1, 2, 4))},
        texts=("5 with +-2 +-3 +-7 in #2 :", "1 with +-1 +-2 +-4 in #2 :"),
    )
    other = "#2 1 + 2 = 3 #1 3 - 1 = 2"
    scores = WalkDataModule().score([RIGHT, other, RIGHT, other], batch)
    assert scores.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("field", "value", "least", "most"),
    [
        ("steps", 0, 1, 999),
        ("largest_number", 100, 4, 99),
        ("largest_size", 11, 2, 10),
        ("sizes", 9, 1, 8),
    ],
)
def test_spec_out_of_bounds(field: str, value: int, least: int, most: int) -> None:
    message = f"data.walks.{field}={value}; use an int from {least} to {most}"
    with pytest.raises(ValueError, match=message):
        WalkSpec(**{field: value})


def test_sizes_that_the_walks_cannot_give() -> None:
    with pytest.raises(ValueError, match=r"data\.val_size=0 must be at least 1"):
        WalkDataModule(val_size=0)
    with pytest.raises(ValueError, match=r"data\.test_size=9, but data.walks gives only about"):
        WalkDataModule(SMALL, test_size=9).heldout_prompts("test")
