"""What the policy says of a rollout: by the sampler or recomputed, of all rows or of some."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import runs
from tre_lightning.batches import PromptBatch, Rollout, TrainingBatch
from tre_lightning.entropy import Region
from tre_lightning.methods import EntropyBonus, Method, PolicyOutputs
from tre_lightning.policy.actor_critic import ActorCritic
from tre_lightning.policy.head import HeadOptions
from tre_lightning.sampling import InProcess, Sampling
from tre_lightning.sampling.options import RolloutArgs
from tre_lightning.training import ppo
from tre_lightning.training.micro_batches import PassLimit
from tre_lightning.training.options import DiagnosticsArgs, PPOArgs
from tre_lightning.training.rollout_evaluation import (
    EvaluatedRollout,
    PolicyRecord,
    evaluate_rollout,
    taken_from_sampler,
)

HOW = HeadOptions((), temperature=3.0, memory=2**20)


class Seen(EntropyBonus):
    """Keeps the log-probabilities of all tokens, and an entropy of a region of its own."""

    needs_logits = True
    observed_regions = (Region(top_k=3),)

    def observe(self, outputs: PolicyOutputs, reference: PolicyOutputs | None) -> Tensor:
        assert outputs.logits is not None
        entropy = outputs.entropy(Region(top_k=3)).region
        return torch.cat([outputs.logits.log_softmax(-1), entropy.unsqueeze(1)], dim=1)

    def scale(self, outputs: PolicyOutputs) -> Tensor:
        return outputs.logprobs


def evaluated(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    by_sampler: bool,
    critic: str = "shared",
    looked_at: Tensor | None = None,
    memory: int = HOW.memory,
    sample_batch_size: int | None = None,
) -> EvaluatedRollout:
    """Twelve responses of unequal lengths and what is made of them."""
    looked_at = torch.ones(12, dtype=torch.bool) if looked_at is None else looked_at
    how = HeadOptions((), temperature=HOW.temperature, memory=memory)
    record = PolicyRecord([Seen(0.1)], how, Region(top_p=0.9), looked_at)
    sampling = Sampling(
        num_responses=4,
        max_new_tokens=10,
        eos_token_ids=range(1, 6),
        pad_token_id=0,
        seed=7,
        temperature=HOW.temperature,
        sample_batch_size=sample_batch_size,
        record=record.step if by_sampler else None,
    )
    rollout = InProcess().sample(model, prompts, sampling)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 4
    torch.manual_seed(0)
    actor_critic = ActorCritic(model, None, has_values=critic == "shared")
    if actor_critic.value_head is not None:
        torch.nn.init.normal_(actor_critic.value_head.weight)
    scores = torch.zeros(12)
    return evaluate_rollout(rollout, scores, record, actor_critic, None, PassLimit(tokens=60))


def assert_same(one: EvaluatedRollout, other: EvaluatedRollout) -> None:
    """Equal but for rounding."""
    for name in ("old_logprobs", "values"):
        torch.testing.assert_close(getattr(one.experience, name), getattr(other.experience, name))
    assert one.experience.observed.keys() == other.experience.observed.keys() == {"entropy"}
    for name, kept in one.experience.observed.items():
        torch.testing.assert_close(kept, other.experience.observed[name])
    assert torch.equal(one.looked_at, other.looked_at)
    for ours, theirs in zip(one.entropies, other.entropies, strict=True):
        torch.testing.assert_close(ours[one.looked_at], theirs[one.looked_at])
    assert one.scales == pytest.approx(other.scales)


@pytest.fixture
def prompts(make_prompts: Any) -> PromptBatch:
    batch: PromptBatch = make_prompts([3, 7, 5])
    return batch


def test_the_sampler_says_what_passes_over_the_rollout_say(
    any_policy: PreTrainedModel, prompts: PromptBatch
) -> None:
    recomputed = evaluated(any_policy, prompts, by_sampler=False)
    assert len(recomputed.padding) > 0 and not recomputed.entropies.full.eq(0.0).all()
    assert_same(evaluated(any_policy, prompts, by_sampler=True), recomputed)
    # In parts, in another order, and looked at step by step.
    parts = evaluated(any_policy, prompts, by_sampler=True, memory=1, sample_batch_size=3)
    assert_same(parts, recomputed)


def test_without_critic_and_reference_nothing_is_read_again(
    policy: PreTrainedModel, prompts: PromptBatch
) -> None:
    found = evaluated(policy, prompts, by_sampler=True, critic="none")
    assert len(found.padding) == 0 and found.experience.values is None
    recomputed = evaluated(policy, prompts, by_sampler=False, critic="none")
    torch.testing.assert_close(found.experience.old_logprobs, recomputed.experience.old_logprobs)


def test_a_pass_of_which_no_token_counts(any_policy: PreTrainedModel) -> None:
    """Ranks that share weights run one where they have no row."""
    ids, mask = torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.bool)
    idle = Rollout(ids, mask, ids, mask, mask[:, 0]).uncounted().trimmed()
    asked = HeadOptions((Region(top_p=0.9), Region(top_k=2)), temperature=1.0, memory=2**20)
    outputs, values = ActorCritic(any_policy, None).outputs(idle, asked)
    assert len(outputs.logprobs) == len(outputs.entropy(Region(top_k=2)).full) == 0
    assert values is not None and values.shape == (1, 1)


@pytest.mark.parametrize("by_sampler", [True, False])
def test_entropies_of_some_rows(
    by_sampler: bool, policy: PreTrainedModel, prompts: PromptBatch
) -> None:
    whole = evaluated(policy, prompts, by_sampler=False)
    some = torch.arange(12) % 3 == 1
    found = evaluated(policy, prompts, by_sampler=by_sampler, looked_at=some)
    assert torch.equal(found.looked_at, whole.looked_at & some.unsqueeze(1))
    for part, of_all in zip(found.entropies, whole.entropies, strict=True):
        torch.testing.assert_close(part[some], of_all[some])
        assert not part[~some].any()
    torch.testing.assert_close(found.experience.old_logprobs, whole.experience.old_logprobs)
    none = evaluated(policy, prompts, by_sampler=by_sampler, looked_at=torch.zeros_like(some))
    assert not none.looked_at.any()


def test_the_rows_that_are_looked_at_are_those_of_the_global_batch(make_prompts: Any) -> None:
    whole = make_prompts([2, 3, 4, 5])
    args = DiagnosticsArgs(fraction=0.3)
    rows = args.rows(whole, 5, seed=1)
    assert rows.sum() == 6 and len(rows) == 20
    parts = []
    for first, end in ((0, 1), (1, 4)):
        prompts = make_prompts([2, 3, 4, 5][first:end])
        prompts.first_row, prompts.total_rows = first, 4
        parts.append(args.rows(prompts, 5, seed=1))
    assert torch.equal(torch.cat(parts), rows)
    assert not torch.equal(args.rows(whole, 5, seed=2), rows)
    assert DiagnosticsArgs().rows(whole, 5, seed=1).all()
    assert DiagnosticsArgs(fraction=1e-9).rows(whole, 5, seed=1).sum() == 1


# ----- when the sampler is asked


def test_the_sampler_is_asked_where_it_is_exact(policy: PreTrainedModel) -> None:
    model, plain, rollout = ActorCritic(policy, None), PPOArgs(), RolloutArgs()

    def asked(args: PPOArgs = plain, how: RolloutArgs = rollout, *methods: Method) -> bool:
        return taken_from_sampler(args, how, methods, model)

    needs_reference = EntropyBonus(0.1)
    needs_reference.needs_reference = True
    assert asked() and asked(plain, rollout, EntropyBonus(0.1))
    assert not asked(plain, rollout, needs_reference)
    assert not asked(PPOArgs(old_logprobs="recompute"))
    assert not asked(plain, RolloutArgs(engine="continuous_batching"))
    assert not asked(plain, RolloutArgs(engine="vllm"))
    assert not asked(plain, RolloutArgs(max_importance_weight=2.0))
    assert not asked(plain, RolloutArgs(min_importance_weight=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert not asked() and asked(PPOArgs(old_logprobs="sampler"))
    torch.set_float32_matmul_precision("medium")
    try:
        assert not asked()
    finally:
        torch.set_float32_matmul_precision("highest")
    policy.bfloat16()
    assert not asked() and asked(PPOArgs(old_logprobs="sampler"))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.rollout.min_importance_weight=0.5", "min_importance_weight=0.5"),
        ("--model.rollout.engine=continuous_batching", "model.rollout.engine=in_process"),
        ("--model.rollout.max_importance_weight=2", "model.rollout.max_importance_weight=2"),
    ],
)
def test_a_sampler_that_cannot_be_asked_is_refused(
    flag: str, words: str, tmp_path: Path, refusal: runs.Said
) -> None:
    line = refusal(runs.run, tmp_path / "run", "--model.ppo.old_logprobs=sampler", flag)
    assert "model.ppo.old_logprobs=sampler" in line and words in line and "recompute" in line


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.ppo.old_logprobs=engine", "model.ppo.old_logprobs"),
        ("--model.ppo.micro_batch_tokens=0", "model.ppo.micro_batch_tokens=0"),
        ("--model.ppo.micro_batch_size=-1", "model.ppo.micro_batch_size=-1"),
        ("--model.diagnostics.fraction=0", "model.diagnostics.fraction=0"),
    ],
)
def test_values_that_cannot_be_are_refused(
    flag: str, named: str, tmp_path: Path, refusal: runs.Said
) -> None:
    assert named in refusal(runs.run, tmp_path / "run", flag)


# ----- whole runs

PRECISE = "--trainer.precision=64-true"
# Llama-like, so that a run has a method that keeps something of each token.
FORKING = {"class_path": "tre_lightning.methods.ForkingTokens", "init_args": {"fraction": 0.5}}
OBSERVING = {"trainer.callbacks": [runs.TRE, FORKING]}


def test_a_run_is_the_same_with_the_samplers_log_probabilities(tmp_path: Path) -> None:
    for way in ("sampler", "recompute"):
        flags = (f"--model.ppo.old_logprobs={way}", "--model.ppo.kl_coef=0.1", PRECISE)
        runs.run(tmp_path / way, *flags, changes=OBSERVING)
    left, right = (runs.weights(tmp_path / way) for way in ("sampler", "recompute"))
    assert 0.0 < runs.distance(left, right) < runs.ROUNDING
    runs.assert_close_curves(tmp_path / "sampler", tmp_path / "recompute")


def test_a_fraction_of_the_rows_changes_only_the_entropies(tmp_path: Path) -> None:
    for fraction in (1.0, 0.4):
        flags = (f"--model.diagnostics.fraction={fraction}", PRECISE)
        runs.run(tmp_path / str(fraction), *flags, changes=OBSERVING)
    whole, part = (tmp_path / name for name in ("1.0", "0.4"))
    assert runs.distance(runs.weights(whole), runs.weights(part)) == 0.0
    ours, theirs = runs.scalars(whole), runs.scalars(part)
    assert ours.keys() == theirs.keys()
    differ = {tag for tag, events in ours.items() if events != theirs[tag]}
    assert differ and all(tag.startswith("entropy/") for tag in differ)


GRPO = {
    "model.policy": {"architecture": runs.ARCHITECTURE, "critic": "none"},
    "model.ppo": {"estimator": "grpo", "num_epochs": 2, "num_minibatches": 2},
    "trainer.callbacks": [],
}


def test_groups_of_equal_scores_have_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[int, int]] = []  # computed, and of the minibatch
    plain = ppo.contributing

    def noting(batch: TrainingBatch, *args: Any) -> Tensor:
        wanted = plain(batch, *args)
        assert torch.equal(wanted, (batch.advantages != 0.0).any(1) & batch.response_mask.any(1))
        rows.append((int(wanted.sum()), len(batch)))
        return wanted

    monkeypatch.setattr(ppo, "contributing", noting)
    runs.run(tmp_path / "some", PRECISE, changes=GRPO)
    monkeypatch.setattr(ppo, "contributing", lambda batch, *_: batch.response_mask.any(1))
    runs.run(tmp_path / "all", PRECISE, changes=GRPO)
    assert 0 < sum(some for some, _ in rows) < sum(every for _, every in rows)
    assert (
        runs.distance(runs.weights(tmp_path / "some"), runs.weights(tmp_path / "all"))
        < runs.ROUNDING
    )
    some, every = (runs.scalars(tmp_path / name) for name in ("some", "all"))
    for tag in ("loss/policy", "policy/grad_norm", "rollout/score"):
        for (_, ours), (_, theirs) in zip(some[tag], every[tag], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9), tag
    assert all(math.isfinite(value) for _, value in some["policy/grad_norm"])


@pytest.mark.parametrize(
    "flags",
    [
        (),  # an entropy term learns from every row
        ("--model.ppo.kl_coef=0.1", "--model.ppo.kl_in=loss", "--model.ppo.kl_estimator=k2"),
    ],
    ids=["term", "kl"],
)
def test_what_learns_from_every_row_gets_every_row(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[int, int]] = []
    plain = ppo.contributing

    def noting(batch: TrainingBatch, *args: Any) -> Tensor:
        wanted = plain(batch, *args)
        rows.append((int(wanted.sum()), len(batch)))
        return wanted

    monkeypatch.setattr(ppo, "contributing", noting)
    changes = {**GRPO, "trainer.callbacks": [] if flags else [runs.TRE], "trainer.max_epochs": 1}
    runs.run(tmp_path / "run", *flags, changes=changes)
    assert rows and all(some == every for some, every in rows)
