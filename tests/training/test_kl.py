"""Tests of the KL penalty: gradients by enumeration, the controller, whole runs that come home."""

import math
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import runs
from tre_lightning.batches import PromptBatch, Rollout
from tre_lightning.methods import PolicyOutputs
from tre_lightning.training.kl import KLEstimator, KLPlace, kl_estimate, kl_loss, next_kl_coef
from tre_lightning.training.objective import Objective
from tre_lightning.training.options import PPOArgs
from tre_lightning.training.targets import build_experience, compute_targets

V, T = 3, 3  # tokens and length of the sequences that are enumerated
SEQUENCES = torch.tensor(list(product(range(V), repeat=T)))


def prefixes() -> Tensor:
    """The number of the prefix before each token of each sequence, ``[N, T]``."""
    columns, numbers, first = [], torch.zeros(len(SEQUENCES), dtype=torch.long), 0
    for t in range(T):
        columns.append(first + numbers)
        numbers, first = numbers * V + SEQUENCES[:, t], first + V**t
    return torch.stack(columns, 1)


PREFIXES = prefixes()
CONTEXTS = int(PREFIXES.max()) + 1  # 1 + 3 + 9

Policy = Tensor  # logits [CONTEXTS, V], float64


def policies(seed: int, spread: float = 1.0) -> tuple[Policy, Policy]:
    """A policy and a reference that are as far apart as ``spread`` says."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(CONTEXTS, V, generator=generator, dtype=torch.float64)
    away = torch.randn(CONTEXTS, V, generator=generator, dtype=torch.float64)
    return (ref + spread * away).requires_grad_(), ref


def logprobs(policy: Policy) -> Tensor:
    """Of every token of every sequence, ``[N, T]``."""
    return policy.log_softmax(-1)[PREFIXES, SEQUENCES]


def of_sequences(policy: Policy, ref: Policy) -> Tensor:
    """KL(policy || ref) of whole sequences."""
    log_p, log_r = logprobs(policy).sum(1), logprobs(ref).sum(1)
    return (log_p.exp() * (log_p - log_r)).sum()


def of_tokens(policy: Policy, ref: Policy, met: Policy) -> Tensor:
    """Sum over the positions of KL(policy || ref) there, met as often as ``met`` meets them."""
    log_p, log_r = policy.log_softmax(-1), ref.log_softmax(-1)
    by_context = (log_p.exp() * (log_p - log_r)).sum(-1)
    weights = logprobs(met).sum(1).exp().detach()
    return (weights.unsqueeze(1) * by_context[PREFIXES]).sum()


def gradient(value: Tensor, policy: Policy) -> Tensor:
    return torch.autograd.grad(value, policy)[0]


def penalty_gradient(
    estimator: KLEstimator,
    place: KLPlace,
    policy: Policy,
    ref: Policy,
    old: Policy | None = None,
    length: int = T,
) -> Tensor:
    """The expected gradient of a KL penalty of weight 1 as a run has it, score 0.

    Every sequence counts as often as ``old`` (the policy itself unless given) samples it. Only the
    first ``length`` tokens of a sequence count.
    """
    old = policy if old is None else old
    mask = (torch.arange(T) < length).expand(len(SEQUENCES), T)
    rollout = Rollout(
        prompt_ids=torch.ones(len(SEQUENCES), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(SEQUENCES), 1, dtype=torch.bool),
        response_ids=SEQUENCES,
        response_mask=mask,
        finished=torch.ones(len(SEQUENCES), dtype=torch.bool),
    )
    scores = torch.zeros(len(SEQUENCES))
    sampled = logprobs(old).detach()
    experience = build_experience(rollout, scores, sampled, logprobs(ref).detach(), None)
    ppo = PPOArgs(estimator="reinforce_pp", kl_coef=1.0, clip_eps_low=None, clip_eps_high=None)
    # Not by the options: those that are refused have a gradient, too.
    object.__setattr__(ppo, "kl_estimator", estimator)
    object.__setattr__(ppo, "kl_in", place)
    batch = compute_targets(
        experience,
        estimator=ppo.estimator,
        num_responses=1,
        gamma=1.0,
        gae_lambda=1.0,
        kl_coef=1.0 if place == "reward" else 0.0,
        kl_estimator=estimator,
        whiten=False,
    )
    objective = Objective.of(batch, ppo, [], 1.0)
    parts = objective(slice(None), PolicyOutputs(logprobs(policy)[mask], {}))
    weights = sampled.sum(1, keepdim=True).exp().expand(-1, T)[mask]
    return gradient((parts.sum(0) * weights).sum(), policy)


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.cosine_similarity(left.flatten(), right.flatten(), dim=0))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert cosine(found, expected) > 0.999


PAIRS = [(seed, spread) for seed in range(5) for spread in (0.1, 1.0, 3.0)]
FORWARD = [("k1", "reward"), ("k2", "loss"), ("k1", "loss_weighted"), ("k3", "loss_weighted")]


# --- what each form is unbiased for ---


@pytest.mark.parametrize(("estimator", "place"), FORWARD)
def test_the_gradient_is_that_of_the_kl_to_the_reference(
    estimator: KLEstimator, place: KLPlace
) -> None:
    for seed, spread in PAIRS:
        policy, ref = policies(seed, spread)
        of_one = penalty_gradient(estimator, place, policy, ref, length=1)
        first = of_one.abs().sum(1) > 0
        assert first.tolist() == [True] + [False] * (CONTEXTS - 1)
        log_p, log_r = policy[0].log_softmax(-1), ref[0].log_softmax(-1)
        assert_same(of_one, gradient((log_p.exp() * (log_p - log_r)).sum(), policy))
        # Of sequences: the whole response's, or each token's own.
        whole = of_sequences(policy, ref)
        expected = whole if place == "reward" else of_tokens(policy, ref, policy)
        found = penalty_gradient(estimator, place, policy, ref)
        assert_same(found, gradient(expected, policy))


def test_the_gradient_of_k3_as_a_loss_is_that_of_the_reverse_kl() -> None:
    for seed, spread in PAIRS:
        policy, ref = policies(seed, spread)
        log_p, log_r = policy[0].log_softmax(-1), ref[0].log_softmax(-1)
        reverse = (log_r.exp() * (log_r - log_p)).sum()
        found = penalty_gradient("k3", "loss", policy, ref, length=1)
        assert_same(found, gradient(reverse, policy))


def test_k3_in_the_reward_is_the_difference_of_both_and_may_point_away() -> None:
    worst = 1.0
    for seed, spread in PAIRS:
        policy, ref = policies(seed, spread)
        log_p, log_r = policy[0].log_softmax(-1), ref[0].log_softmax(-1)
        forward = gradient((log_p.exp() * (log_p - log_r)).sum(), policy)
        log_p = policy[0].log_softmax(-1)
        reverse = gradient((log_r.exp() * (log_r - log_p)).sum(), policy)
        found = penalty_gradient("k3", "reward", policy, ref, length=1)
        torch.testing.assert_close(found, forward - reverse, rtol=1e-5, atol=1e-7)
        worst = min(worst, cosine(found, forward))
    assert worst < -0.5


def test_k2_in_the_reward_is_neither() -> None:
    for seed, spread in PAIRS:
        policy, ref = policies(seed, spread)
        log_p, log_r = policy[0].log_softmax(-1), ref[0].log_softmax(-1)
        forward = gradient((log_p.exp() * (log_p - log_r)).sum(), policy)
        log_p = policy[0].log_softmax(-1)
        of_k2 = gradient((log_p.exp() * (log_p - log_r).square() / 2).sum(), policy)
        found = penalty_gradient("k2", "reward", policy, ref, length=1)
        torch.testing.assert_close(found, of_k2 - forward, rtol=1e-5, atol=1e-7)


def test_what_is_refused_has_no_gradient_of_a_kl() -> None:
    for seed, spread in PAIRS:
        policy, ref = policies(seed, spread)
        nothing = penalty_gradient("k1", "loss", policy, ref)
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-9)
        log_p, log_r = policy[0].log_softmax(-1), ref[0].log_softmax(-1)
        of_k2 = gradient((log_p.exp() * (log_p - log_r).square() / 2).sum(), policy)
        found = penalty_gradient("k2", "loss_weighted", policy, ref, length=1)
        torch.testing.assert_close(found, of_k2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_weighted_the_gradient_is_exact_after_an_update_too(estimator: KLEstimator) -> None:
    biased = 1.0
    for seed, spread in PAIRS:
        (policy, ref), (old, _) = policies(seed, spread), policies(seed + 100)
        expected = gradient(of_tokens(policy, ref, old), policy)
        assert policy.log_softmax(-1).sub(old.log_softmax(-1)).abs().max() > 0.1
        # Each position as old meets it, the token there by the policy itself.
        assert_same(penalty_gradient(estimator, "loss_weighted", policy, ref, old), expected)
        biased = min(biased, cosine(penalty_gradient("k2", "loss", policy, ref, old), expected))
    assert biased < 0.99


def test_values_of_k1_and_k3_are_unbiased() -> None:
    policy, ref = policies(0)
    log_p, log_r = logprobs(policy).detach(), logprobs(ref)
    weights = log_p.sum(1, keepdim=True).exp()
    means = {k: (weights * kl_estimate(k, log_p, log_r)).sum() for k in get_args(KLEstimator)}
    expected = of_sequences(policy, ref).item()
    assert means["k1"].item() == pytest.approx(expected, rel=1e-6)
    assert means["k3"].item() == pytest.approx(expected, rel=1e-6)
    assert abs(means["k2"].item() / expected - 1) > 0.01
    assert kl_estimate("k3", log_p, log_r).min() >= 0.0


def test_estimates_by_hand() -> None:
    # log ratios log 2 and -log 2: k3 is 1/2 - 1 + log 2 and 2 - 1 - log 2
    log_two = math.log(2)
    policy, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 - log_two, -2.0 + log_two])
    expected = {
        "k1": [log_two, -log_two],
        "k2": [log_two**2 / 2] * 2,
        "k3": [log_two - 0.5, 1 - log_two],
    }
    for estimator, values in expected.items():
        found = kl_estimate(cast(KLEstimator, estimator), policy, ref)
        assert found.tolist() == pytest.approx(values, abs=1e-6)
    old = policy - math.log(3)  # the ratio is 3
    weighted = kl_loss("k1", "loss_weighted", policy, old, ref)
    assert weighted.tolist() == pytest.approx([3 * log_two, -3 * log_two], abs=1e-6)


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": -0.1}, r"model\.ppo\.kl_coef=-0.1 "),
        ({"kl_coef": math.nan}, r"model\.ppo\.kl_coef=nan "),
        ({"kl_coef": math.inf}, r"model\.ppo\.kl_coef=inf "),
        ({"kl_estimator": "k4"}, r"model\.ppo\.kl_estimator=k4 .*k1, k2, k3"),
        ({"kl_in": "advantage"}, r"model\.ppo\.kl_in=advantage .*reward, loss, loss_weighted"),
        ({"kl_in": "loss"}, r"model\.ppo\.kl_estimator=k1 with model\.ppo\.kl_in=loss "),
        (
            {"kl_estimator": "k2", "kl_in": "loss_weighted"},
            r"model\.ppo\.kl_estimator=k2 with model\.ppo\.kl_in=loss_weighted ",
        ),
        ({"kl_coef": 0.1, "kl_target": 0.0}, r"model\.ppo\.kl_target=0.0 must be above 0"),
        ({"kl_coef": 0.1, "kl_target": math.nan}, r"model\.ppo\.kl_target=nan must be above 0"),
        ({"kl_target": 0.1}, r"model\.ppo\.kl_target=0.1 .*kl_coef above 0"),
        ({"kl_horizon": 0}, r"model\.ppo\.kl_horizon=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOArgs(**options)


def test_the_default_is_right() -> None:
    assert (PPOArgs().kl_estimator, PPOArgs().kl_in) == ("k1", "reward")


# --- the controller ---


def test_the_controller_is_proportional_and_clipped() -> None:
    def moved(kl: float, responses: int = 1000) -> float:
        return next_kl_coef(0.5, kl, target=0.1, responses=responses, horizon=10_000)

    assert moved(0.1) == pytest.approx(0.5)
    assert moved(0.11) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    assert moved(0.09) == pytest.approx(0.5 * (1 - 0.1 * 0.1))
    assert moved(7.0) == moved(math.inf) == pytest.approx(0.5 * (1 + 0.2 * 0.1))
    assert moved(0.0) == pytest.approx(0.5 * (1 - 0.2 * 0.1))
    assert moved(0.0, responses=10**6) == pytest.approx(0.5 * 0.8)  # never 0 or below
    assert moved(math.nan) == 0.5  # nothing was counted


# --- whole runs ---


class Shifted(Callback):
    """Moves the policy off its reference before the first iteration."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add noise to the head's weights."""
        module: Any = pl_module
        if module.iteration:
            return
        head = module.actor_critic.policy.get_output_embeddings()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            head.weight += 0.4 * torch.randn(head.weight.shape, generator=generator)


class Unscored(runs.PlusCountdown):
    """Every response scores 0: nothing but the penalty moves the policy."""

    def score(self, responses: Sequence[str], prompts: PromptBatch) -> Tensor:
        """0 each."""
        return torch.zeros(len(responses))


HOME: dict[str, Any] = {
    "data.class_path": "test_kl.Unscored",
    "data.init_args.batch_size": 16,
    "data.init_args.iterations_per_epoch": 15,
    "data.init_args.val_size": 1,
    "data.init_args.test_size": 1,
    "trainer.max_epochs": 1,
    "trainer.callbacks": [{"class_path": "test_kl.Shifted"}],
    "model.policy.critic": "none",
    "model.ppo": {
        "estimator": "reinforce_pp",
        "whiten_advantages": False,
        "num_minibatches": 2,
        "kl_coef": 1.0,
    },
}


def at_home(run_dir: Path, estimator: str, place: str, **changes: Any) -> list[float]:
    """``rollout/ref_kl`` of a run that only a penalty moves."""
    flags = (f"--model.ppo.kl_estimator={estimator}", f"--model.ppo.kl_in={place}")
    runs.run(run_dir, *flags, changes={**HOME, **changes})
    return [value for _, value in runs.scalars(run_dir)["rollout/ref_kl"]]


@pytest.mark.parametrize(("estimator", "place"), [*FORWARD, ("k3", "loss")])
def test_a_shifted_policy_comes_home(estimator: str, place: str, tmp_path: Path) -> None:
    kl = at_home(tmp_path / "run", estimator, place)
    assert kl[0] > 0.05
    assert kl[-1] < 0.3 * kl[0]
    scalars = runs.scalars(tmp_path / "run")
    assert {value for _, value in scalars["policy/kl_coef"]} == {1.0}
    # The loss holds the penalty there, and the surrogate of a penalty in the reward.
    assert ("loss/kl" in scalars) == (place != "reward")
    if estimator == "k3" and place == "loss":  # the logged estimate, over the first update's tokens
        assert scalars["loss/kl"][0][1] == pytest.approx(kl[0], rel=0.3)
        assert scalars["loss/policy"][0][1] == pytest.approx(0.0, abs=1e-6)


def test_k3_in_the_reward_does_not_lead_home(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"model\.ppo\.kl_estimator=k3 .*kl_in=reward does not pull"
    ):
        kl = at_home(tmp_path / "run", "k3", "reward")
    assert kl[-1] > kl[0] > 0.05


def test_micro_batches_change_no_penalty_in_the_loss(tmp_path: Path) -> None:
    two = {
        **HOME,
        "data.init_args.iterations_per_epoch": 2,
        "model.ppo": {**HOME["model.ppo"], "kl_estimator": "k3", "kl_in": "loss_weighted"},
    }
    for size in (5, 64):
        flags = (f"--model.ppo.micro_batch_size={size}", "--trainer.precision=64-true")
        runs.run(tmp_path / f"{size}", *flags, "--model.optim.eps=1e-4", changes=two)
    left, right = (runs.weights(tmp_path / f"{size}") for size in (5, 64))
    assert runs.distance(left, right) < 1e-6


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose coefficient moves; tests only read it."""
    run_dir = tmp_path_factory.mktemp("steered") / "run"
    runs.run(run_dir, changes=STEERED)
    return run_dir


STEERED = {
    "model.ppo": {"num_minibatches": 2, "kl_coef": 0.5, "kl_target": 0.001, "kl_horizon": 40},
    "checkpoint": {"keep_all": True},
}


def test_the_coefficient_follows_the_logged_kl(steered: Path) -> None:
    scalars = runs.scalars(steered)
    kl = [value for _, value in scalars["rollout/ref_kl"]]
    expected = [0.5]
    for value in kl[:-1]:
        expected.append(next_kl_coef(expected[-1], value, target=0.001, responses=16, horizon=40))
    found = [value for _, value in scalars["policy/kl_coef"]]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[1] < 0.5 < found[-1] / found[-2] * 0.5  # below its target at first, then above


def test_a_resumed_run_goes_on_with_the_coefficient(steered: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "resumed"
    shutil.copytree(steered, run_dir)
    runs.resume(run_dir, f"{run_dir}/checkpoints/iteration=1.ckpt", changes=STEERED)
    runs.assert_same_run(steered, run_dir)


def test_without_a_target_a_resumed_run_takes_its_own_coefficient(
    steered: Path, tmp_path: Path
) -> None:
    ckpt = f"--ckpt_path={steered}/checkpoints/iteration=3.ckpt"
    changes = {"model.ppo": {"num_minibatches": 2, "kl_coef": 0.25}}
    runs.run(tmp_path / "run", ckpt, changes=changes)
    assert [value for _, value in runs.scalars(tmp_path / "run")["policy/kl_coef"]] == [0.25]


def test_a_meaningless_penalty_is_one_line(tmp_path: Path, refusal: runs.Said) -> None:
    line = refusal(
        runs.run, tmp_path / "run", "--model.ppo.kl_coef=0.1", "--model.ppo.kl_in=loss", alone=True
    )
    assert "model.ppo.kl_estimator=k1 with model.ppo.kl_in=loss" in line and "k2 or k3" in line
