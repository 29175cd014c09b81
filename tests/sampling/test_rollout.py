"""Tests of tre_lightning.sampling.in_process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import runs
from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.policy.actor_critic import PolicyArgs, load_language_model
from tre_lightning.policy.reading import positions, reading
from tre_lightning.sampling import in_process
from tre_lightning.sampling.in_process import concatenate, generate, pick_tokens
from tre_lightning.sampling.options import RolloutArgs

MakePrompts = Callable[[Sequence[int]], PromptBatch]
VOCAB_SIZE, PAD, EOS = 50, 0, 1
GRID = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


# --- pick_tokens ---


def picks(probabilities: list[float], uniform: Tensor = GRID, top_p: float = 1.0) -> Tensor:
    logits = torch.tensor(probabilities).log().expand(len(uniform), -1)
    return pick_tokens(logits, uniform, top_p)[0]


def test_tokens_are_picked_by_their_probability() -> None:
    probabilities = [0.125, 0.0, 0.25, 0.5, 0.0, 0.0625, 0.0625, 0.0]
    tokens = picks(probabilities)
    assert tokens.dtype == torch.int64 and tokens.shape == (1000,)
    counts = tokens.bincount(minlength=8).tolist()
    assert counts == pytest.approx([1000 * p for p in probabilities], abs=1)
    assert counts[1] == counts[4] == counts[7] == 0


def test_tokens_without_probability_are_not_picked_at_the_ends() -> None:
    smallest, largest = 0.0, 1 - 2**-53  # what torch.rand can give in float64
    uniform = torch.tensor([smallest, largest], dtype=torch.float64)
    assert picks([0.0, 0.0, 0.3, 0.0, 0.7, 0.0, 0.0], uniform).tolist() == [2, 4]
    # probabilities whose float32 sum is not 1
    third = [0.0] + [1 / 3] * 3 + [0.0]
    assert picks(third, uniform).tolist() == [1, 3]


@pytest.mark.parametrize("vocabulary", [64, 65, 127, 500])
def test_any_size_of_vocabulary_is_picked_from_by_its_running_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(200, vocabulary, generator=generator)
    logits[:, ::7] = -torch.inf
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    reached = logits.double().softmax(-1).cumsum(-1)
    expected = (reached <= uniform.unsqueeze(-1)).sum(-1)
    assert pick_tokens(logits, uniform)[0].tolist() == expected.tolist()


@pytest.mark.parametrize(("first", "last"), [(0, 0), (63, 64), (64, 127), (130, 130)])
def test_the_ends_are_tokens_with_probability_in_any_block(first: int, last: int) -> None:
    probabilities = torch.zeros(131)
    probabilities[first], probabilities[last] = 1 / 3, 2 / 3
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert picks(probabilities.tolist(), uniform).tolist() == [first, last]


def test_of_logits_that_are_no_numbers_a_token_of_the_vocabulary_is_picked() -> None:
    tokens, logprobs = pick_tokens(torch.full((1, 65), torch.nan), torch.tensor([0.5]))
    assert 0 <= int(tokens) < 65 and logprobs.isnan().all()


def test_picks_do_not_wrap_or_share_between_rows() -> None:
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]]).log()
    uniform = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    assert pick_tokens(logits, uniform)[0].tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.35, {1: 1.0}),  # crossed by the first token
        (0.45, {1: 4 / 7, 3: 3 / 7}),
        (0.65, {1: 4 / 7, 3: 3 / 7}),
        (0.75, {0: 2 / 9, 1: 4 / 9, 3: 3 / 9}),  # the token that crosses stays
        (1.0, {0: 0.2, 1: 0.4, 2: 0.1, 3: 0.3}),
    ],
)
def test_top_p_samples_from_the_smallest_nucleus(top_p: float, kept: dict[int, float]) -> None:
    counts = picks([0.2, 0.4, 0.1, 0.3], top_p=top_p).bincount(minlength=4).tolist()
    assert counts == pytest.approx([1000 * kept.get(i, 0.0) for i in range(4)], abs=1)
    assert all(counts[i] == 0 for i in range(4) if i not in kept)


def test_a_tokens_logprob_is_that_of_the_whole_distribution() -> None:
    probabilities = torch.tensor([0.2, 0.4, 0.1, 0.3])
    tokens, logprobs = pick_tokens(probabilities.log().expand(1000, -1), GRID, top_p=0.45)
    assert set(tokens.tolist()) == {1, 3}  # renormalised they have 4/7 and 3/7
    torch.testing.assert_close(logprobs, probabilities[tokens].log())


# --- generate ---


def sample(
    model: PreTrainedModel,
    prompts: PromptBatch,
    uniforms: Tensor,
    *,
    num_responses: int = 1,
    eos: Sequence[int] = (EOS,),
    temperature: float = 1.0,
    top_p: float = 1.0,
    size: int | None = None,
) -> Rollout:
    return generate(
        model,
        prompts,
        num_responses=num_responses,
        uniforms=uniforms,
        eos_token_ids=eos,
        pad_token_id=PAD,
        temperature=temperature,
        top_p=top_p,
        sample_batch_size=size,
    )


def only_row(prompts: PromptBatch, row: int) -> PromptBatch:
    """One prompt without its padding."""
    real = prompts.prompt_mask[row]
    ids = prompts.prompt_ids[row, real].unsqueeze(0)
    alone = {"prompt_ids": ids, "prompt_mask": real[real].unsqueeze(0), "first_row": row}
    return replace(prompts, **alone, texts=("",), extras=({},))


def uniform_policy(policy: PreTrainedModel) -> PreTrainedModel:
    """All tokens equally likely: uniform number (i + 0.5) / V samples token i."""
    torch.nn.init.zeros_(policy.lm_head.weight)
    return policy


def forced(*rows: list[int]) -> Tensor:
    """The uniform numbers that make ``uniform_policy`` write these tokens."""
    return (torch.tensor(rows, dtype=torch.float64) + 0.5) / VOCAB_SIZE


@pytest.mark.parametrize("with_end", [False, True])
def test_nearly_greedy_sampling_equals_transformers(
    any_policy: PreTrainedModel, make_prompts: MakePrompts, with_end: bool
) -> None:
    prompts, steps = make_prompts([3, 7, 5, 1]), 12
    uniforms = torch.rand(4, steps, dtype=torch.float64)

    def both(eos: int) -> tuple[Rollout, Tensor]:
        ours = sample(any_policy, prompts, uniforms, eos=[eos], temperature=1e-5)
        theirs = any_policy.generate(
            input_ids=prompts.prompt_ids,
            attention_mask=prompts.prompt_mask.long(),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=eos,
            pad_token_id=PAD,
        )[:, prompts.prompt_ids.shape[1] :]
        return ours, theirs

    ours, theirs = both(VOCAB_SIZE + 1)  # no end
    assert ours.response_ids.tolist() == theirs.tolist()
    assert ours.response_mask.all() and not ours.finished.any()
    if with_end:
        # A token that ends some rows only: the fourth of the first row.
        end = int(ours.response_ids[0, 3])
        ours, theirs = both(end)
        assert ours.response_ids.tolist() == theirs.tolist()
        assert ours.finished.tolist() == (theirs == end).any(1).tolist()
        assert ours.finished[0]


def test_a_response_does_not_depend_on_the_other_rows(
    any_policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    prompts, n = make_prompts([2, 9, 4]), 2
    uniforms = torch.rand(6, 10, dtype=torch.float64, generator=torch.manual_seed(0))
    ends = range(1, 10)
    together = sample(any_policy, prompts, uniforms, num_responses=n, eos=ends, temperature=3.0)
    lengths = together.response_mask.sum(1)
    assert lengths.min() < lengths.max()  # rows end at different times
    for row in range(6):
        alone = sample(
            any_policy,
            only_row(prompts, row // n),
            uniforms[row : row + 1],
            eos=ends,
            temperature=3.0,
        )
        length = int(lengths[row])
        assert alone.response_ids[0].tolist() == together.response_ids[row, :length].tolist()
        assert alone.finished[0] == together.finished[row]


def test_the_end_token_counts_and_padding_follows(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    uniforms = forced([5, EOS, 8, 9], [6, 7, 8, 9], [6, 7, 8, EOS], [2, 9, 9, 9])
    rollout = sample(uniform_policy(policy), make_prompts([1, 2, 3, 1]), uniforms, eos=[EOS, 2])
    assert rollout.response_ids.tolist() == [
        [5, EOS, PAD, PAD],
        [6, 7, 8, 9],
        [6, 7, 8, EOS],
        [2, PAD, PAD, PAD],
    ]
    assert rollout.response_mask.sum(1).tolist() == [2, 4, 4, 1]
    assert torch.equal(rollout.response_mask, rollout.response_ids != PAD)
    assert rollout.finished.tolist() == [True, False, True, True]


def test_the_response_is_as_wide_as_its_longest_row(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    uniforms = forced([5, 6, EOS, 8, 9, 9], [EOS, 6, 7, 8, 9, 9])
    rollout = sample(uniform_policy(policy), make_prompts([1, 1]), uniforms)
    assert rollout.response_ids.tolist() == [[5, 6, EOS], [EOS, PAD, PAD]]
    assert rollout.response_mask.shape == (2, 3)
    assert rollout.finished.all()


def test_a_sampled_pad_token_counts(policy: PreTrainedModel, make_prompts: MakePrompts) -> None:
    rollout = sample(uniform_policy(policy), make_prompts([1]), forced([5, PAD, 6, EOS]))
    assert rollout.response_ids.tolist() == [[5, PAD, 6, EOS]]
    assert rollout.response_mask.all()


def test_responses_to_one_prompt_lie_side_by_side(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts([1, 3])
    uniforms = forced([10, 11], [20, 21], [30, 31], [40, 41], [5, 6], [7, 8])
    rollout = sample(uniform_policy(policy), prompts, uniforms, num_responses=3)
    assert rollout.response_ids[:, 0].tolist() == [10, 20, 30, 40, 5, 7]
    for row in range(6):
        assert torch.equal(rollout.prompt_ids[row], prompts.prompt_ids[row // 3])
        assert torch.equal(rollout.prompt_mask[row], prompts.prompt_mask[row // 3])


def test_top_p_reaches_the_sampling(policy: PreTrainedModel, make_prompts: MakePrompts) -> None:
    # 50 tokens of 0.02: a nucleus of 0.09 holds the first five, each now of 0.2.
    uniforms = torch.tensor([[0.1, 0.5, 0.99]], dtype=torch.float64)
    rollout = sample(uniform_policy(policy), make_prompts([2]), uniforms, eos=[49], top_p=0.09)
    assert rollout.response_ids.tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("rows", [3, 5])
def test_a_wrong_number_of_uniforms_is_refused(
    policy: PreTrainedModel, make_prompts: MakePrompts, rows: int
) -> None:
    with pytest.raises(ValueError, match=f"uniforms has {rows} rows, not 2 prompts x 2"):
        sample(policy, make_prompts([1, 1]), torch.zeros(rows, 4), num_responses=2)


# --- rows that leave the batch, and batches of some of the rows ---

# Sliding windows and convolutions keep their state in caches of their own kinds.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
}
OTHER_CACHES: dict[str, dict[str, Any]] = {
    "sliding": {
        **SMALL,
        "model_type": "qwen2",
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "convolution": {
        **SMALL,
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "block_multiple_of": 8,
    },
}


def sample_alone(
    model: PreTrainedModel, prompts: PromptBatch, uniforms: Tensor, n: int, ends: Sequence[int]
) -> list[list[int]]:
    """Row by row, without padding and cache."""
    responses = []
    for row, uniform in enumerate(uniforms):
        ids = prompts.prompt_ids[row // n, prompts.prompt_mask[row // n]].tolist()
        response: list[int] = []
        for number in uniform:
            logits = model(input_ids=torch.tensor([ids + response]), use_cache=False).logits[:, -1]
            response.append(int(pick_tokens(logits / 3.0, number.unsqueeze(0))[0]))
            if response[-1] in ends:
                break
        responses.append(response)
    return responses


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding", "convolution"])
@torch.no_grad()
def test_responses_are_those_of_rows_sampled_alone(
    kind: str, architectures: dict[str, dict[str, Any]], make_prompts: MakePrompts
) -> None:
    torch.manual_seed(0)
    architecture = {**architectures, **OTHER_CACHES}[kind]
    model = load_language_model(PolicyArgs(architecture=architecture)).double().eval()
    prompts, n, ends = make_prompts([2, 9, 4, 1, 6]), 3, range(1, 8)
    uniforms = torch.rand(15, 14, dtype=torch.float64, generator=torch.manual_seed(0))
    expected = sample_alone(model, prompts, uniforms, n, ends)
    lengths = [len(response) for response in expected]
    assert len(set(lengths)) > 3 and max(lengths) == 14  # some leave at some time, some never
    for size in (None, 1, 2, 3, 7, 15, 100):
        rollout = sample(
            model, prompts, uniforms, num_responses=n, eos=ends, temperature=3.0, size=size
        )
        assert rollout.response_mask.sum(1).tolist() == lengths
        for row, response in enumerate(expected):
            assert rollout.response_ids[row, : len(response)].tolist() == response, size
            assert (rollout.response_ids[row, len(response) :] == PAD).all()
            assert bool(rollout.finished[row]) == (response[-1] in ends)
        assert torch.equal(rollout.prompt_ids, prompts.prompt_ids.repeat_interleave(n, 0))
        assert torch.equal(rollout.prompt_mask, prompts.prompt_mask.repeat_interleave(n, 0))


def passes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """A list that grows by (rows, columns) of the input of every forward pass."""
    made: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        made.append(tuple(kwargs["input_ids"].shape))

    reading(model)  # its passes do not count
    model.register_forward_pre_hook(note, with_kwargs=True)
    return made


def test_finished_rows_leave_once_an_eighth_has_finished(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    lengths = [1, 2, 3, 4, *[6] * 12]  # of 16 responses to 2 prompts
    rows = [[*[5] * (length - 1), EOS, *[7] * (7 - length)] for length in lengths]
    made = passes(uniform_policy(policy))
    rollout = sample(policy, make_prompts([3, 3]), forced(*rows), num_responses=8)
    # Running after each token: 15 of 16, 14 of 16, 13 of 14, 12 of 14, 12 of 12, none.
    assert made == [(2, 3), (16, 1), (14, 1), (14, 1), (12, 1), (12, 1)]
    assert rollout.response_mask.sum(1).tolist() == lengths
    assert rollout.finished.all()


def test_rows_that_all_finish_at_once_or_never(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    made = passes(uniform_policy(policy))
    rollout = sample(policy, make_prompts([3]), forced(*[[5, EOS, 7]] * 4), num_responses=4)
    assert made == [(1, 3), (4, 1)]
    assert rollout.response_ids.tolist() == [[5, EOS]] * 4 and rollout.finished.all()
    made.clear()
    rollout = sample(policy, make_prompts([3]), forced(*[[5, 6, 7]] * 4), num_responses=4)
    assert made == [(1, 3), (4, 1), (4, 1)]
    assert rollout.response_mask.all() and not rollout.finished.any()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, [(3, 9), (6, 1)]),
        (6, [(3, 9), (6, 1)]),
        # Whole groups, the shortest prompts first; columns that none needs are left out.
        (5, [(2, 4), (4, 1), (1, 9), (2, 1)]),
        (2, [(1, 2), (2, 1), (1, 4), (2, 1), (1, 9), (2, 1)]),
        (1, [(1, 2), (1, 1), (1, 1), (1, 4), (1, 1), (1, 1), (1, 9), (1, 1), (1, 1)]),
    ],
)
def test_a_prompt_is_read_once_and_no_more_rows_are_sampled_than_allowed(
    policy: PreTrainedModel,
    make_prompts: MakePrompts,
    size: int | None,
    expected: list[tuple[int, int]],
) -> None:
    made = passes(uniform_policy(policy))
    sample(policy, make_prompts([2, 9, 4]), forced(*[[5, 6]] * 6), num_responses=2, size=size)
    assert made == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_mode_is_that_of_before(
    policy: PreTrainedModel, make_prompts: MakePrompts, training: bool, fails: bool
) -> None:
    reading(policy.train(training))
    seen: list[bool] = []

    def note(module: PreTrainedModel, _: Any) -> None:
        seen.append(module.training)
        if fails and len(seen) == 2:
            raise RuntimeError("out of memory")

    policy.register_forward_pre_hook(note)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(policy, make_prompts([2]), forced([5, 6, 7]))
    else:
        sample(policy, make_prompts([2, 3]), forced([5, 6, 7], [5, 6, 7]), size=1)
    assert seen and not any(seen)
    assert all(module.training == training for module in policy.modules())


def test_parts_are_joined_in_order_and_padded_to_the_longest() -> None:
    def part(prompt: int, response: list[int], finished: bool) -> Rollout:
        ids = torch.tensor([response])
        prompts = torch.tensor([[PAD, prompt]])
        ended = torch.tensor([finished])
        return Rollout(prompts, prompts != PAD, ids, torch.ones_like(ids, dtype=torch.bool), ended)

    whole = concatenate([part(5, [6], True), part(7, [8, 9, 4], False), part(3, [2, 2], True)], 40)
    assert whole.prompt_ids.tolist() == [[PAD, 5], [PAD, 7], [PAD, 3]]
    assert whole.prompt_mask.tolist() == [[False, True]] * 3
    assert whole.response_ids.tolist() == [[6, 40, 40], [8, 9, 4], [2, 2, 40]]
    assert whole.response_mask.tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, False],
    ]
    assert whole.response_mask.dtype == torch.bool
    assert whole.finished.tolist() == [True, False, True]


def test_a_sample_batch_of_no_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.sample_batch_size=0 must be at least 1"):
        RolloutArgs(sample_batch_size=0)


def test_a_run_in_small_sample_batches_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[tuple[str, int | None]] = set()

    def noting(model: PreTrainedModel, prompts: PromptBatch, **how: Any) -> Rollout:
        used.add((prompts.split, how["sample_batch_size"]))
        return generate(model, prompts, **how)

    monkeypatch.setattr(in_process, "generate", noting)
    flags = ["--trainer.precision=64-true"]
    runs.run(tmp_path / "whole", *flags)
    assert used == {("train", None), ("val", None)}
    used.clear()
    runs.run(tmp_path / "parts", *flags, "--model.rollout.sample_batch_size=3")
    assert used == {("train", 3), ("val", 3)}
    whole, parts = (runs.weights(tmp_path / name) for name in ("whole", "parts"))
    assert runs.distance(whole, parts) < 1e-6
    runs.assert_close_curves(tmp_path / "parts", tmp_path / "whole")


# --- the batch ---


def test_positions_start_at_0_behind_the_padding() -> None:
    mask = torch.tensor([[False, False, True, True, False], [True, True, True, True, True]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 3, 4]]


def test_a_batch_moves_whole(make_prompts: MakePrompts) -> None:
    prompts = make_prompts([2, 3])
    moved = prompts.to(torch.device("meta"))
    assert moved.prompt_ids.is_meta and moved.prompt_mask.is_meta
    assert len(moved) == 2 and moved.extras == prompts.extras and moved.total_rows == 2
