"""Tests of tre_lightning.policy.lora, and of policies that have adapters."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import runs
from batches import LOGPROBS_ALONE, one_response
from tre_lightning.batches import PromptBatch
from tre_lightning.methods import PolicyOutputs
from tre_lightning.ops import Region
from tre_lightning.policy.actor_critic import (
    ActorCritic,
    PolicyArgs,
    head_input,
    load_language_model,
)
from tre_lightning.policy.head import HeadOptions, head_loss, plain_head
from tre_lightning.policy.lora import (
    LoraArgs,
    add_adapters,
    fingerprint,
    frozen_names,
    has_adapters,
    merged_state_dict,
    without_adapters,
)
from tre_lightning.sampling.in_process import generate
from tre_lightning.training.ppo import PPOModule
from tre_lightning.training.reward_model import RewardModelModule
from tre_lightning.training.sft import SFTModule

IDS = torch.tensor([[5, 9, 3, 17, 30, 8]])
KEY = ("adapters", "test", 0)


def adapted(model: PreTrainedModel, args: LoraArgs | None = None) -> PreTrainedModel:
    """With adapters that change what the model says."""
    add_adapters(model, args or LoraArgs(rank=2, alpha=4), *KEY)
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    numbers = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2, generator=numbers)


def weights_of(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if part in name}


# ----- adapters in a model


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(
    any_policy: PreTrainedModel,
) -> None:
    before = any_policy(IDS).logits
    plain = {name: list(p.shape) for name, p in any_policy.named_parameters()}
    assert not has_adapters(any_policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapters(any_policy, LoraArgs(rank=2, alpha=4), *KEY)
    assert has_adapters(any_policy)
    assert torch.equal(any_policy(IDS).logits, before)
    trained = {name: p for name, p in any_policy.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    # Every matrix but the embeddings and the head: [out, in] gets 2 x in and out x 2 numbers.
    matrices = [
        shape
        for name, shape in plain.items()
        if len(shape) == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
    ]
    assert len(matrices) in (8, 14)  # gpt2 has 4 of them a layer, llama 7
    assert sum(p.numel() for p in trained.values()) == sum(2 * sum(shape) for shape in matrices)
    assert len(trained) == 2 * len(matrices)
    assert frozen_names(any_policy) == {n for n in any_policy.state_dict() if ".lora_" not in n}


def test_named_layers_only(policy: PreTrainedModel) -> None:
    add_adapters(policy, LoraArgs(rank=3, target_modules=["q_proj", "v_proj"]), *KEY)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all(".q_proj." in name or ".v_proj." in name for name in trained)
    a = dict(policy.named_parameters())["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert a.shape == (3, 16)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "qwen3_moe"])
def test_experts_and_routers_stay_frozen(model_type: str, architecture: dict[str, Any]) -> None:
    # Neither is a linear layer here: all experts are one tensor, a router picks and does not add.
    options = {**architecture, **EXPERTS, "model_type": model_type, "moe_intermediate_size": 8}
    policy = load_language_model(PolicyArgs(architecture=options))
    args = PolicyArgs(model="m", lora=LoraArgs(rank=2))
    model = ActorCritic.build(args, policy, None)
    model.try_out(args)
    outputs, _ = model.outputs(one_response(IDS, 5), LOGPROBS_ALONE)
    outputs.logprobs.sum().backward()
    trained = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4 and all(".self_attn." in name for name in trained)
    assert all(gradient is not None for gradient in trained.values())


@pytest.mark.parametrize(
    ("model_type", "names"),
    [("mixtral", ["w1", "w2", "w3"]), ("mixtral", ["experts"]), ("phimoe", ["router"])],
)
def test_named_experts_and_routers_are_refused(
    model_type: str, names: list[str], architecture: dict[str, Any]
) -> None:
    options = {**architecture, **EXPERTS, "model_type": model_type}
    policy = load_language_model(PolicyArgs(architecture=options))
    with pytest.raises(ValueError, match=r"model\.policy\.lora\.target_modules=\['"):
        add_adapters(policy, LoraArgs(rank=2, target_modules=names), *KEY)


def test_an_adapter_adds_alpha_over_rank_times_b_a(policy: PreTrainedModel) -> None:
    layer = policy.model.layers[0].mlp.up_proj
    x = torch.randn(4, 16, generator=torch.manual_seed(0))
    plain = layer(x)
    adapted(policy, LoraArgs(rank=4, alpha=10))
    layer = policy.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), plain + 2.5 * x @ a.T @ b.T)


def test_the_numbers_depend_on_the_key_alone(architecture: dict[str, Any]) -> None:
    def started(state: int, *key: int | str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = load_language_model(PolicyArgs(architecture=architecture))
        torch.manual_seed(state)
        add_adapters(model, LoraArgs(rank=2), *key)
        return {name: p.detach() for name, p in weights_of(model, ".lora_A.").items()}

    first = started(1, *KEY)
    again, other = started(2, *KEY), started(1, "adapters", "test", 1)
    assert len({float(a.sum()) for a in first.values()}) == len(first) == 14
    assert all(torch.equal(again[name], a) for name, a in first.items())
    assert not any(torch.equal(other[name], a) for name, a in first.items())
    # As peft's: uniform in +-1 / sqrt(in), here 1/4 and 1/sqrt(32).
    assert 0.2 < max(float(a.abs().max()) for a in first.values()) <= 0.25


def test_without_adapters_the_model_is_the_frozen_one(any_policy: PreTrainedModel) -> None:
    before = any_policy(IDS).logits
    model = adapted(any_policy)
    after = model(IDS).logits
    assert (after - before).abs().max() > 0.1
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), without_adapters(model):
        assert torch.equal(model(IDS).logits, before)
        raise RuntimeError("inside")
    assert torch.equal(model(IDS).logits, after)
    assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_policy_is_merged(
    any_policy: PreTrainedModel,
    architecture: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    make_prompts: Callable[[Sequence[int]], PromptBatch],
    tied: bool,
    tmp_path: Path,
) -> None:
    if tied and any_policy.config.model_type == "llama":
        any_policy = load_language_model(
            PolicyArgs(architecture={**architecture, "tie_word_embeddings": True})
        )
    names = set(any_policy.state_dict())
    model = adapted(any_policy).train()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert merged_state_dict(model).keys() == names
    ActorCritic(model, None).save_pretrained(tmp_path / "model", tokenizer)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)

    def greedy(language_model: PreTrainedModel) -> Tensor:
        rows = torch.full((3, 12), 0.5, dtype=torch.float64)
        return generate(
            language_model,
            make_prompts([3, 6, 1]),
            num_responses=1,
            uniforms=rows,
            eos_token_ids=[1],
            pad_token_id=0,
            temperature=1e-5,
        ).response_ids

    assert torch.equal(greedy(loaded), greedy(model))
    with without_adapters(model):
        assert not torch.equal(greedy(loaded), greedy(model))


def test_a_fingerprint_is_that_of_the_frozen_weights(policy: PreTrainedModel) -> None:
    model = adapted(policy)
    first = fingerprint(model)
    shake(model)
    weights_of(model, ".lora_A.").popitem()[1].data.add_(1.0)
    assert fingerprint(model) == first
    model.lm_head.weight.data[0, 0] += 1.0
    assert fingerprint(model) != first
    assert fingerprint(model.bfloat16()) != first


# ----- the fused head


def test_the_fused_head_reads_adapted_hidden_states(any_policy: PreTrainedModel) -> None:
    policy = adapted(any_policy).double()
    head = plain_head(policy)
    assert head is policy.get_output_embeddings() is not None
    mask = torch.ones(3, 9, dtype=torch.bool)
    ids = torch.randint(3, 50, mask.shape, generator=torch.manual_seed(0))
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[2, 3:] = False
    labels, regions = ids[:, -5:][counted], (Region(), Region(top_p=0.9), Region(top_k=3))

    def losses(rows: slice, outputs: PolicyOutputs) -> Tensor:
        entropies = sum(outputs.entropy(region).scaled for region in regions)
        return (torch.arange(13.0, dtype=torch.float64)[rows] + 1).cos() * outputs.logprobs + (
            0.3 * entropies
        )

    found = []
    for fused in (True, False):
        how = HeadOptions(regions, 0.7, 4 * 50 * 8, fused=fused)
        linear = head if fused else None
        source, _ = head_input(policy, linear, ids, mask, counted)
        assert source.shape == (13, 16 if fused else 50)
        loss = head_loss(source, linear, labels, how, losses)
        trained = [p for p in policy.parameters() if p.requires_grad]
        found.append((loss.logprobs, loss.losses, *torch.autograd.grad(loss.total, trained)))
    assert all(gradient.any() for gradient in found[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


# ----- policy and critic


@pytest.fixture
def lora_args(model_dir: Path) -> Callable[..., PolicyArgs]:
    def make(rank: int = 2, *, bfloat16_base: bool = False, **options: Any) -> PolicyArgs:
        lora = LoraArgs(rank=rank, alpha=4, bfloat16_base=bfloat16_base)
        return PolicyArgs(model=str(model_dir), lora=lora, **options)

    return make


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_policy_and_critic_train_adapters_and_value_head(
    lora_args: Callable[..., PolicyArgs], critic: str
) -> None:
    model = ActorCritic.load(lora_args(critic=critic))
    nn.init.ones_(model.value_head.weight)
    ours, theirs = model.policy_parameters(), model.critic_parameters()
    assert len(ours) == 2 * 14 and len(theirs) == 2 + (2 * 14 if critic == "separate" else 0)
    assert not {id(p) for p in ours} & {id(p) for p in theirs}
    assert {id(p) for p in (*ours, *theirs)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    shake(model)
    _, values = model.outputs(one_response(IDS, 3), LOGPROBS_ALONE)
    values.square().sum().backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
    assert reached == {id(p) for p in (ours if critic == "shared" else theirs)} | {
        id(p) for p in model.value_head.parameters()
    }


def test_policy_and_critic_share_the_frozen_weights(lora_args: Callable[..., PolicyArgs]) -> None:
    model = ActorCritic.load(lora_args())
    assert model.critic is not None
    trunk = dict(model.policy.base_model.named_parameters())
    critic = dict(model.critic.named_parameters())
    assert trunk.keys() == critic.keys()
    for name, parameter in trunk.items():
        assert (parameter is critic[name]) == (".lora_" not in name), name
        if ".lora_A." in name:
            assert not torch.equal(parameter, critic[name])
    full = ActorCritic.load(PolicyArgs(model=lora_args().model))
    assert full.critic is not None
    assert not {id(p) for p in full.policy.parameters()} & {id(p) for p in full.critic.parameters()}


def test_a_critic_of_its_own_has_adapters(
    lora_args: Callable[..., PolicyArgs], architecture: dict[str, Any], tmp_path: Path
) -> None:
    wide = load_language_model(PolicyArgs(architecture={**architecture, "hidden_size": 32}))
    wide.save_pretrained(tmp_path)
    model = ActorCritic.load(lora_args(critic_model=str(tmp_path)))
    assert model.critic is not None and has_adapters(model.critic)
    assert len(model.critic_parameters()) == 2 * 14 + 2


def test_a_bfloat16_base_has_float32_adapters(lora_args: Callable[..., PolicyArgs]) -> None:
    model = ActorCritic.load(lora_args(bfloat16_base=True))
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name or name.startswith("value_head.")
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
    hidden, _, values = model._read(one_response(IDS, 3), LOGPROBS_ALONE)
    assert hidden.dtype == torch.bfloat16 and values.dtype == torch.float32


def test_a_saved_configuration_is_taken(model_dir: Path) -> None:
    lora: Any = {"rank": 3, "alpha": 6, "target_modules": ["q_proj"], "bfloat16_base": True}
    args = PolicyArgs(model=str(model_dir), lora=lora)
    assert args.lora == LoraArgs(3, 6, ["q_proj"], True)


# ----- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"policy\.lora\.rank=0 must be at least 1"),
        ({"alpha": 0}, r"policy\.lora\.alpha=0 must be above 0"),
        ({"target_modules": []}, r"policy\.lora\.target_modules is empty"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraArgs(**options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nope"], r"target_modules=\['nope'\] does not fit the model"),
        (["q_proj", "lm_head"], r"names the head or a layer that is not linear; leave it out"),
        (["embed_tokens"], r"names the head or a layer that is not linear; leave it out"),
    ],
)
def test_layers_that_get_no_adapters(
    policy: PreTrainedModel, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapters(policy, LoraArgs(target_modules=names), *KEY)


def test_without_peft(policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'tre-lightning\[lora\]'"):
        add_adapters(policy, LoraArgs(), *KEY)


def test_there_must_be_weights_to_freeze(architecture: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.policy\.lora needs weights to freeze"):
        ActorCritic.load(PolicyArgs(architecture=architecture, lora=LoraArgs()))


# ----- whole runs

LORA = {"rank": 2, "alpha": 16}
POLICY = {
    "model.policy": {"architecture": runs.ARCHITECTURE, "lora": LORA},
    "model.ppo.kl_estimator": "k2",
    "model.ppo.kl_in": "loss",
}
KL = "--model.ppo.kl_coef=0.1"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A finished run and its policy; tests only read it."""
    run_dir = tmp_path_factory.mktemp("done") / "run"
    changes = {**POLICY, "checkpoint": {"keep_all": True}}
    policy = runs.run(run_dir, KL, changes=changes).model.actor_critic.policy
    return run_dir, policy


def test_checkpoints_hold_what_is_trained(done: tuple[Path, PreTrainedModel]) -> None:
    names = list(runs.weights(done[0]))
    heads = [name for name in names if ".value_head." in name]
    adapters = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    assert len(heads) == 2 and len(adapters) == 2 * 7 * 2 == len(names) - 2
    first, last = (runs.weights(done[0], name) for name in ("iteration=1", "last"))
    assert all((first[name] - last[name]).any() for name in names)


def test_the_reference_is_the_policy_without_adapters(
    done: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    kl = [value for _, value in runs.scalars(done[0])["rollout/ref_kl"]]
    assert kl[0] < 1e-9 and min(kl[1:]) > 1e-4  # the sampler and a pass round otherwise
    # The logits and the reference path say the same.
    runs.run(tmp_path / "plain", KL, "--model.ppo.fused=false", changes=POLICY)
    others = [value for _, value in runs.scalars(tmp_path / "plain")["rollout/ref_kl"]]
    assert others == pytest.approx(kl, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["iteration=1", "iteration=2", "iteration=3"])
def test_resumed_is_uninterrupted(
    done: tuple[Path, PreTrainedModel], name: str, tmp_path: Path
) -> None:
    whole, _ = done
    ckpt = f"--ckpt_path={whole}/checkpoints/{name}.ckpt"
    runs.run(tmp_path / "run", KL, ckpt, changes=POLICY)
    assert runs.distance(runs.weights(tmp_path / "run"), runs.weights(whole)) == 0.0
    iteration = int(name[-1])
    curves = runs.scalars(whole)
    for tag in ("rollout/score", "rollout/ref_kl", "loss/total", "policy/grad_norm"):
        assert runs.scalars(tmp_path / "run")[tag] == curves[tag][iteration:], tag


def test_validation_from_a_checkpoint(done: tuple[Path, PreTrainedModel]) -> None:
    run_dir, _ = done
    words = ("--ckpt_path=last", KL)
    scores = runs.run(run_dir, *words, command="validate", changes=POLICY).trainer.callback_metrics
    assert float(scores["val/score"]) == runs.scalars(run_dir)["val/score"][-1][1]


def test_the_exported_model_is_plain_and_says_the_same(done: tuple[Path, PreTrainedModel]) -> None:
    run_dir, policy = done
    policy.eval()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    warm_start = AutoModelForCausalLM.from_pretrained(policy.config._name_or_path)
    assert type(model).__name__ == "LlamaForCausalLM" and not has_adapters(model)
    assert model.state_dict().keys() == warm_start.state_dict().keys()
    ids = torch.randint(3, 48, (8, 6), generator=torch.manual_seed(0))
    logits = policy(ids).logits
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-4)
    assert (warm_start(ids).logits - logits).abs().max() > 1e-2
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), policy.generate(ids, **how))


def test_adapters_of_other_weights_are_refused(
    done: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    ckpt = f"--ckpt_path={done[0]}/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="checkpoint of adapters to another model"):
        other = ("--warm_start.steps=4", f"--warm_start.cache_dir={tmp_path}/cache")
        runs.run(tmp_path / "run", ckpt, *other, changes=POLICY)
    with pytest.raises(ValueError, match=r"another model\.policy\.lora.*'alpha': 16"):
        runs.run(tmp_path / "run", ckpt, "--model.policy.lora.alpha=8", changes=POLICY)


def test_refused_in_one_line_before_any_work(
    done: tuple[Path, PreTrainedModel],
    tmp_path: Path,
    refusal: runs.Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    trained_anew = f"--warm_start.cache_dir={cache}"
    tokenizer = {**POLICY["model.policy"], "tokenizer": str(done[0] / "model")}
    scratch = {"model.policy": tokenizer, "warm_start": None}
    assert "needs weights to freeze" in refusal(runs.run, run_dir, changes=scratch)
    layers = "--model.policy.lora.target_modules=[nope]"
    assert "does not fit the model" in refusal(
        runs.run, run_dir, layers, trained_anew, changes=POLICY
    )
    ckpt = f"--ckpt_path={done[0]}/checkpoints/last.ckpt"
    rank = "--model.policy.lora.rank=3"
    assert "another model" in refusal(runs.run, run_dir, ckpt, rank, trained_anew, changes=POLICY)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "tre-lightning[lora]" in refusal(runs.run, run_dir, trained_anew, changes=POLICY)
    assert not run_dir.exists() and not cache.exists()


def test_supervised_training_has_no_adapters(tmp_path: Path) -> None:
    args = PolicyArgs(model="m", lora=LoraArgs())
    for kind in (SFTModule, RewardModelModule):
        with pytest.raises(ValueError, match=r"model\.policy\.lora is for reinforcement"):
            kind(output_dir=str(tmp_path / "model"), policy=args)


def test_the_runs_seed_is_that_of_the_adapters(model_dir: Path) -> None:
    def started(seed: int) -> Tensor:
        module = PPOModule(policy=PolicyArgs(model=str(model_dir), lora=LoraArgs()), seed=seed)
        module.configure_model()
        return torch.cat([p.flatten() for p in module.actor_critic.policy_parameters()])

    assert torch.equal(started(1), started(1)) and not torch.equal(started(1), started(2))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    policy = {**POLICY["model.policy"], "gradient_checkpointing": True}
    changes = {"model.policy": policy}
    flags = (KL, "--trainer.max_epochs=1", "--model.ppo.num_minibatches=1")
    runs.run(tmp_path / "one", *flags, changes=changes)
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    words = runs.words(tmp_path / "two", *flags, *two, changes=changes)
    codes, printed = runs.command_on_ranks(words)
    assert codes == [0, 0], printed[-3000:]
    one, both = runs.weights(tmp_path / "one"), runs.weights(tmp_path / "two")
    assert runs.distance(one, both) < 1e-5
    assert (tmp_path / "two" / "model" / "README.md").exists()
