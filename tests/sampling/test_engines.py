"""Tests of tre_lightning.sampling: the samplers behind the interface, and the correction."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import runs
from tre_lightning.batches import PromptBatch, Rollout, TrainingBatch
from tre_lightning.common.seeding import uniforms
from tre_lightning.sampling import (
    VLLM,
    ContinuousBatching,
    InProcess,
    RolloutEngine,
    Sampling,
    check_engine,
    make_engine,
)
from tre_lightning.sampling.options import RolloutArgs, VLLMArgs
from tre_lightning.training import ppo
from tre_lightning.training.mismatch import corrected, importance_weights

MakePrompts = Callable[[Sequence[int]], PromptBatch]
VOCAB_SIZE, PAD = 50, 0
HOW = Sampling(
    num_responses=3,
    max_new_tokens=10,
    eos_token_ids=range(1, 6),
    pad_token_id=PAD,
    seed=7,
    temperature=3.0,
)
ENGINES = {"in_process": InProcess, "continuous_batching": ContinuousBatching}


def by_forward(model: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probability of each response token, row by row, without padding and cache."""
    found = torch.zeros(rollout.response_ids.shape)
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row, rollout.prompt_mask[row]]
        response = rollout.response_ids[row, rollout.response_mask[row]]
        ids = torch.cat([prompt, response]).unsqueeze(0)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = (logits / temperature).log_softmax(-1)
        found[row, : len(response)] = log_p[torch.arange(len(response)), response]
    return found


def test_the_configured_engine_is_made() -> None:
    assert isinstance(make_engine(RolloutArgs()), InProcess)
    assert isinstance(make_engine(RolloutArgs(engine="continuous_batching")), ContinuousBatching)
    saved: Any = {"gpu_memory_utilization": 0.5, "max_model_len": 64}  # as a checkpoint has it
    engine = make_engine(RolloutArgs(engine="vllm", vllm=saved))
    assert isinstance(engine, VLLM) and engine.args == VLLMArgs(0.5, 64)


@pytest.mark.parametrize("name", list(ENGINES))
def test_logprobs_are_those_of_the_tempered_distribution(
    name: str, any_policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts([3, 7, 5, 1])
    rollout = ENGINES[name]().sample(any_policy, prompts, HOW)
    mask, found = rollout.response_mask, rollout.behaviour_logprobs
    assert found is not None and found.shape == mask.shape and found.dtype == torch.float32
    lengths = mask.sum(1)
    assert lengths.min() < lengths.max()
    torch.testing.assert_close(found, by_forward(any_policy, rollout, HOW.temperature))
    assert (found[~mask] == 0).all() and (rollout.response_ids[~mask] == PAD).all()
    last = rollout.response_ids[torch.arange(12), lengths - 1]
    assert rollout.finished.tolist() == [int(token) in HOW.eos_token_ids for token in last]
    assert torch.equal(rollout.prompt_ids, prompts.prompt_ids.repeat_interleave(3, 0))
    assert torch.equal(rollout.prompt_mask, prompts.prompt_mask.repeat_interleave(3, 0))
    first = rollout.response_ids[:, 0].view(4, 3)
    assert all(len(set(row)) > 1 for row in first.tolist())  # responses of their own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logprobs_are_float32_whatever_the_weights_are(
    dtype: torch.dtype, policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as Lightning does for 64-true and bf16-true
    try:
        for engine in ENGINES.values():
            rollout = engine().sample(policy.to(dtype), make_prompts([3, 5]), HOW)
            found = rollout.behaviour_logprobs
            assert found is not None and found.dtype == torch.float32
            expected = by_forward(policy.to(torch.float64), rollout, HOW.temperature)
            atol = 0.1 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, expected.float(), rtol=0, atol=atol)
    finally:
        torch.set_default_dtype(before)


def test_greedy_tokens_are_the_same(any_policy: PreTrainedModel, make_prompts: MakePrompts) -> None:
    prompts = make_prompts([3, 7, 5, 1, 2, 9])
    for size in (None, 4):
        how = replace(HOW, num_responses=2, temperature=1e-6, sample_batch_size=size)
        ours, theirs = (engine().sample(any_policy, prompts, how) for engine in ENGINES.values())
        for name in ("response_ids", "response_mask", "finished", "prompt_ids", "prompt_mask"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.response_mask.sum(1).unique().numel() > 2


def test_continuous_batching_repeats_itself_and_leaves_the_state_alone(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts([3, 7, 5, 1])
    engine: RolloutEngine = ContinuousBatching()
    policy.train()
    attention = policy.config._attn_implementation
    before = torch.get_rng_state()
    first, again = (engine.sample(policy, prompts, HOW) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training and policy.config._attn_implementation == attention
    assert torch.equal(first.response_ids, again.response_ids)
    others = [
        engine.sample(policy, replace(prompts, index=1), HOW),
        engine.sample(policy, replace(prompts, split="val"), HOW),
        engine.sample(policy, replace(prompts, first_row=4), HOW),
        engine.sample(policy, prompts, replace(HOW, seed=8)),
    ]
    for other in others:
        assert other.response_ids.tolist() != first.response_ids.tolist()


def test_continuous_batching_samples_from_the_nucleus(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    prompts, how = make_prompts([4, 4]), replace(HOW, top_p=0.3, num_responses=8)
    rollout = ContinuousBatching().sample(policy, prompts, how)
    whole = by_forward(policy, rollout, HOW.temperature).exp()
    assert rollout.behaviour_logprobs is not None
    within = rollout.behaviour_logprobs.exp()[rollout.response_mask]
    # A nucleus of at least 0.3: each probability grows, to at most 1 / 0.3 of what it was.
    grown = within / whole[rollout.response_mask]
    assert (grown > 1.05).all() and (grown < 1 / 0.3 + 1e-3).all()


def test_a_failed_request_is_an_error(
    policy: PreTrainedModel, make_prompts: MakePrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of pages")

    monkeypatch.setattr(policy, "forward", fail)
    with pytest.raises(RuntimeError, match="continuous batching failed at req_0: out of pages"):
        ContinuousBatching().sample(policy, make_prompts([2, 3]), HOW)
    assert not policy.config._attn_implementation.startswith("paged")


# --- vLLM, by a stand-in with the signatures that its documentation gives ---


@dataclass
class FakeSamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    seed: int | None = None
    detokenize: bool = True


class FakeInner:
    """vLLM's model: it takes the names and tensors of a plain Hugging Face model."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def load_weights(self, weights: Any) -> set[str]:
        self.weights = dict(weights)
        assert not any(weight.requires_grad for weight in self.weights.values())
        self.weights = {name: weight.clone() for name, weight in self.weights.items()}
        return set(self.weights)


class FakeLLM:
    """Samples as this package does, from the model that the test gives it, and notes its calls."""

    made: "list[FakeLLM]"
    model: PreTrainedModel

    def __init__(self, model: str, **options: Any) -> None:
        self.has_config = (Path(model) / "config.json").exists()
        self.options, self.calls, self.inner = options, [], FakeInner()
        self.params: list[FakeSamplingParams] = []
        self.made.append(self)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.calls.append(f"wake {tags}")
        return True

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True

    def apply_model(self, func: Callable[[FakeInner], Any]) -> list[Any]:
        self.calls.append("load")
        return [func(self.inner)]

    def generate(
        self, prompts: list[Any], sampling_params: list[FakeSamplingParams], *, use_tqdm: bool
    ) -> list[Any]:
        self.calls.append("generate")
        self.params = sampling_params
        loaded = self.inner.weights
        assert all(torch.equal(w, loaded[name]) for name, w in self.model.named_parameters())
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            one = PromptBatch(ids, ids >= 0, ("",), ({},), "train", int(params.seed or 0), 0, 1)
            assert params.max_tokens and params.stop_token_ids
            how = Sampling(
                *(params.n, params.max_tokens, params.stop_token_ids, PAD, 0),
                *(params.temperature, params.top_p),
            )
            rollout = InProcess().sample(self.model, one, how)
            assert rollout.behaviour_logprobs is not None
            answers = [
                SimpleNamespace(
                    token_ids=tuple(tokens[mask].tolist()),
                    logprobs=[
                        {int(token): SimpleNamespace(logprob=float(value), rank=1)}
                        for token, value in zip(tokens[mask], values[mask], strict=True)
                    ],
                )
                for tokens, mask, values in zip(
                    rollout.response_ids,
                    rollout.response_mask,
                    rollout.behaviour_logprobs,
                    strict=True,
                )
            ]
            outputs.append(SimpleNamespace(outputs=answers))
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """A module ``vllm``."""
    module, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    module.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    module.LLM, module.SamplingParams = FakeLLM, FakeSamplingParams  # type: ignore[attr-defined]
    inputs.TokensPrompt = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(FakeLLM, "made", [], raising=False)
    return FakeLLM


def test_vllm_gets_the_weights_before_every_sampling_and_sleeps_after(
    fake_vllm: type[FakeLLM], policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    fake_vllm.model = policy
    prompts, how = make_prompts([3, 7]), replace(HOW, sample_batch_size=4)
    engine = VLLM(VLLMArgs(gpu_memory_utilization=0.4, max_model_len=20))
    assert not fake_vllm.made  # not before it is needed
    first = engine.sample(policy, prompts, how)
    (llm,) = fake_vllm.made
    a_call = ["wake ['weights']", "load", "wake ['kv_cache']", "reset", "generate", "sleep 2"]
    assert llm.calls == ["sleep 2", *a_call]
    assert llm.has_config and llm.options == {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "seed": 0,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 20,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
        "max_num_seqs": 4,
    }
    with torch.no_grad():
        policy.lm_head.weight.mul_(2)  # an update; generate compares
    second = engine.sample(policy, prompts, how)
    assert fake_vllm.made == [llm] and llm.calls == ["sleep 2", *a_call, *a_call]
    for rollout, factor in ((first, 2.0), (second, 1.0)):
        assert rollout.behaviour_logprobs is not None
        # Twice the logits are what half the temperature gives.
        expected = by_forward(policy, rollout, HOW.temperature * factor)
        torch.testing.assert_close(rollout.behaviour_logprobs, expected)
        assert rollout.response_ids.shape[0] == 6


def test_vllm_is_asked_for_what_the_options_say(
    fake_vllm: type[FakeLLM], policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    fake_vllm.model = policy
    prompts = make_prompts([3, 7, 2])
    engine = VLLM(VLLMArgs())
    with torch.autocast("cpu", torch.bfloat16):
        engine.sample(policy, prompts, replace(HOW, top_p=0.5))
    (llm,) = fake_vllm.made
    assert llm.options["dtype"] == "bfloat16" and "max_num_seqs" not in llm.options
    seeds = [params.seed for params in llm.params]
    params = FakeSamplingParams(3, 3.0, 0.5, 10, [1, 2, 3, 4, 5], 0, seeds[1], False)
    assert llm.params[1] == params
    assert len(set(seeds)) == 3 and all(seed is not None and 0 <= seed < 2**31 for seed in seeds)
    # A prompt's seed is that of its place in the global batch.
    last = replace(
        prompts,
        prompt_ids=prompts.prompt_ids[2:],
        prompt_mask=prompts.prompt_mask[2:],
        texts=("",),
        extras=({},),
        first_row=2,
    )
    engine.sample(policy, last, HOW)
    assert [params.seed for params in llm.params] == seeds[2:]


def test_vllm_without_the_package_is_refused_before_any_work(
    tmp_path: Path, refusal: runs.Said
) -> None:
    assert refusal(runs.run, tmp_path / "run", "--model.rollout.engine=vllm", alone=True) == (
        "error: model.rollout.engine=vllm needs the package vllm; pip install 'tre-lightning[vllm]'"
    )
    assert not (tmp_path / "run").exists()


def test_vllm_without_a_gpu_is_refused(
    fake_vllm: type[FakeLLM], tmp_path: Path, refusal: runs.Said
) -> None:
    error = refusal(runs.run, tmp_path / "run", "--model.rollout.engine=vllm")
    assert error.startswith("error: model.rollout.engine=vllm needs a CUDA GPU, not cpu")


def test_continuous_batching_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = RolloutArgs(engine="continuous_batching")
    check_engine(args, "cpu")
    with pytest.raises(ValueError, match="needs whole models, not shards; use in_process"):
        check_engine(args, "cuda", sharded=True)
    check_engine(RolloutArgs(), "cuda", sharded=True)
    monkeypatch.setattr(transformers, "__version__", "5.4.0")
    with pytest.raises(ValueError, match=r"needs transformers 5.17, not 5.4.0; pip install"):
        check_engine(args, "cpu")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("engine=sglang", "engine"),
        ("max_importance_weight=0.5", r"rollout.max_importance_weight=0.5 must be at least 1"),
        ("min_importance_weight=1.5", r"rollout.min_importance_weight=1.5 must lie in (0, 1]"),
        ("min_importance_weight=0", r"rollout.min_importance_weight=0.0 must lie in (0, 1]"),
        ("importance_correction=drop", "importance_correction"),
        ("importance_correction=mask", r"rollout.importance_correction=mask needs bounds"),
        ("vllm.gpu_memory_utilization=1.5", "rollout.vllm.gpu_memory_utilization=1.5 must lie in"),
        ("vllm.max_model_len=0", "rollout.vllm.max_model_len=0 must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(
    flag: str, message: str, tmp_path: Path, refusal: runs.Said
) -> None:
    assert message in refusal(runs.run, tmp_path / "run", f"--model.rollout.{flag}")


# --- the correction ---


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"max": 2.0}, [0.5, 1.5, 2.0, 1.0]),
        ({"min": 0.75}, [0.75, 1.5, 4.0, 1.0]),
        ({"max": 2.0, "min": 0.75}, [0.75, 1.5, 2.0, 1.0]),
        ({"max": 2.0, "how": "mask"}, [0.5, 1.5, 0.0, 1.0]),
        ({"min": 0.75, "how": "mask"}, [0.0, 1.5, 4.0, 1.0]),
        ({"max": 2.0, "min": 0.75, "how": "mask"}, [0.0, 1.5, 0.0, 1.0]),
        # The geometric mean is the fourth root of .5 x 1.5 x 4 = 3, which is 1.316.
        ({"max": 1.32, "how": "mask_response"}, [0.5, 1.5, 4.0, 1.0]),
        ({"max": 1.31, "how": "mask_response"}, [0.0] * 4),
        ({"max": 2.0, "min": 1.0, "how": "mask_response"}, [0.5, 1.5, 4.0, 1.0]),
    ],
)
def test_importance_weights_by_hand(options: dict[str, Any], weights: list[float]) -> None:
    # The second row has a token less, and what stands at its padding does not count.
    p = torch.tensor([[0.2, 0.6, 0.4, 1.0], [0.3, 0.3, 0.3, 0.9]]).log()
    q = torch.tensor([[0.4, 0.4, 0.1, 1.0], [0.3, 0.3, 0.3, 1e-9]]).log()
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    args = RolloutArgs(
        max_importance_weight=options.get("max"),
        min_importance_weight=options.get("min"),
        importance_correction=options.get("how", "truncate"),
    )
    found = importance_weights(p, q, mask, args)
    assert found[0].tolist() == pytest.approx(weights)
    assert found[1, :3].tolist() == pytest.approx([1.0] * 3)


def test_a_response_below_the_smallest_weight_is_masked() -> None:
    p, q = torch.tensor([[0.2, 0.3]]).log(), torch.tensor([[0.4, 0.3]]).log()  # sqrt(.5) = .707
    mask = torch.ones(1, 2, dtype=torch.bool)
    for least, weights in ((0.7, [[0.5, 1.0]]), (0.71, [[0.0, 0.0]])):
        args = RolloutArgs(min_importance_weight=least, importance_correction="mask_response")
        torch.testing.assert_close(importance_weights(p, q, mask, args), torch.tensor(weights))


# Of the four responses to a prompt, by the row.
RATIOS = torch.tensor([2.0, 0.5, 1.0, 1.0])


class Biased(InProcess):
    """An engine that understates by these ratios how likely its samples are."""

    def sample(self, model: PreTrainedModel, prompts: PromptBatch, how: Sampling) -> Rollout:
        rollout = super().sample(model, prompts, how)
        if how.num_responses == 1:  # of an evaluation
            return rollout
        assert rollout.behaviour_logprobs is not None
        wrong = rollout.behaviour_logprobs.view(len(prompts), 4, -1) - RATIOS.log().view(4, 1)
        return replace(rollout, behaviour_logprobs=wrong.flatten(0, 1))


# Plain policy gradient on the first and only step: the policy loss is -mean of weight x advantage.
ONE_STEP = {
    "model.policy.critic": "none",
    "model.ppo": {"estimator": "grpo", "num_epochs": 1, "num_minibatches": 1},
    "model.evaluation": {"num_responses": 1},
    "trainer.max_epochs": 1,
    "data.init_args.iterations_per_epoch": 1,
}


def test_weights_correct_the_policy_loss_and_mismatch_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[TrainingBatch] = []

    def noting(batch: TrainingBatch, how: RolloutArgs) -> TrainingBatch:
        batches.append(corrected(batch, how))
        return batches[-1]

    monkeypatch.setattr(ppo, "make_engine", lambda args: Biased())
    monkeypatch.setattr(ppo, "corrected", noting)
    runs.run(tmp_path / "run", "--model.rollout.max_importance_weight=1.5", changes=ONE_STEP)
    runs.run(tmp_path / "off", changes=ONE_STEP)
    on, off = batches
    mask = on.response_mask
    weight = on.weights["policy"][mask]
    ratio = RATIOS.repeat(4).unsqueeze(1).expand_as(mask)[mask]
    expected = ratio.clamp(max=1.5)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)
    assert off.weights == {}
    scalars = runs.scalars(tmp_path / "run")
    loss = -(expected * on.advantages[mask]).mean()
    assert scalars["loss/policy"] == [(0, pytest.approx(float(loss), rel=1e-3, abs=1e-6))]
    plain = -off.advantages[mask].mean()
    others = runs.scalars(tmp_path / "off")
    assert others["loss/policy"] == [(0, pytest.approx(float(plain), rel=1e-3, abs=1e-6))]
    assert abs(float(loss - plain)) > 1e-3
    # k3 of a ratio r is r - 1 - log r; the engine's log-probabilities are logged either way.
    mean = float((ratio - 1 - ratio.log()).mean())
    for found in (scalars, others):
        assert found["rollout/engine_kl"] == [(0, pytest.approx(mean, rel=1e-3))]
        assert found["rollout/engine_ratio_max"] == [(0, pytest.approx(2.0, rel=1e-3))]


# --- whole runs ---


def test_a_run_with_continuous_batching_trains_and_resumes(tmp_path: Path) -> None:
    changes = {
        "model.rollout": {
            "engine": "continuous_batching",
            "num_responses": 4,
            "max_new_tokens": 8,
            "max_importance_weight": 2.0,
        },
        "trainer.max_epochs": 1,
    }
    run = runs.run(tmp_path / "run", changes=changes)
    assert isinstance(run.model._engine, ContinuousBatching)
    runs.run(tmp_path / "again", changes=changes)
    assert runs.distance(runs.weights(tmp_path / "run"), runs.weights(tmp_path / "again")) == 0.0
    scalars = runs.scalars(tmp_path / "run")
    assert [step for step, _ in scalars["rollout/score"]] == [0, 1]
    assert all(0 <= value < 1e-9 for _, value in scalars["rollout/engine_kl"])
    assert all(abs(value - 1) < 1e-4 for _, value in scalars["rollout/engine_ratio_max"])
    longer = {**changes, "trainer.max_epochs": 2}
    runs.run(tmp_path / "whole", changes=longer)
    runs.resume(tmp_path / "run", changes=longer)
    assert runs.distance(runs.weights(tmp_path / "run"), runs.weights(tmp_path / "whole")) == 0.0


def test_in_process_numbers_are_those_of_the_global_batch(
    policy: PreTrainedModel, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts([3, 7, 5])
    whole = InProcess().sample(policy, prompts, HOW)
    numbers = uniforms(9, 10, "responses", 7, "train", 0)
    assert numbers.shape == (9, 10)
    part = replace(
        prompts,
        prompt_ids=prompts.prompt_ids[1:],
        prompt_mask=prompts.prompt_mask[1:],
        texts=("",) * 2,
        extras=({},) * 2,
        first_row=1,
    )
    rest = InProcess().sample(policy, part, HOW)
    width = rest.response_ids.shape[1]
    assert torch.equal(rest.response_ids, whole.response_ids[3:, :width])
