"""Shared fixtures: a language model, a tokenizer and prompts that take milliseconds to build."""

import copy
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import batches
import runs
from tre_lightning.batches import PromptBatch
from tre_lightning.policy.actor_critic import ActorCritic, PolicyArgs, load_language_model
from tre_lightning.policy.tokenizers import word_tokenizer

# So small a model gains nothing from threads, and loses much where other processes want the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the tests' child processes

# Tests send Ctrl-C to processes, which inherit what a shell's background makes of it: nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis would fail an example for the milliseconds that it takes on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Modules of whole runs whose lines other tests cover.
UNTRACED = {
    "test_distributed",
    "test_experiments",
    "test_interrupt",
    "test_memory",
    "test_methods_in_runs",
    "test_notebooks",
    "test_readme",
    "test_sharding",
    "test_smoke",
}

VOCAB_SIZE = 50
# A wide initialisation: with the usual one all logits of so small a model are nearly equal.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {  # rotary positions: only distances count
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
    },
    "gpt2": {  # absolute positions: a shift by the padding shows
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "initializer_range": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let coverage trace each test once: a traced run takes half as long again.

    Of a test of many cases it traces the first. What the others cover besides does not count.
    """
    seen = set()
    for item in items:
        test = item.path, item.nodeid.partition("[")[0]
        if test in seen or item.path.stem in UNTRACED:
            item.add_marker("no_cover")
        seen.add(test)


@pytest.fixture(scope="session")
def traced_exit() -> Callable[[int], NoReturn]:
    """``os._exit`` as coverage makes it, which saves what it has traced."""
    return os._exit


@pytest.fixture(autouse=True)
def _untraced_children(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    traced_exit: Callable[[int], NoReturn],
) -> None:
    """The processes that an untraced test starts are not traced either."""
    # Coverage wraps it again after every untraced test: a thousand calls deep, it would raise in a
    # forked child, which would go on with the tests.
    monkeypatch.setattr(os, "_exit", traced_exit)
    if request.node.get_closest_marker("no_cover"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def architectures() -> dict[str, dict[str, Any]]:
    """Options of a model of each kind of position encoding, by model type."""
    return copy.deepcopy(ARCHITECTURES)


@pytest.fixture
def architecture(architectures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Options of the random Llama."""
    return architectures["llama"]


@pytest.fixture
def policy() -> PreTrainedModel:
    """A random Llama; every test gets the same weights, and may change them."""
    return build("llama")


@pytest.fixture(params=list(ARCHITECTURES))
def any_policy(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model of each kind of position encoding."""
    return build(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Ids 0 <pad>, 1 <eos>, 2 <unk>, then w0, w1, ..."""
    config = AutoConfig.for_model(**ARCHITECTURES["llama"])
    return word_tokenizer([f"w{i}" for i in range(VOCAB_SIZE - 3)], config)


@pytest.fixture(scope="session")
def model_dir(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama and the tokenizer as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model")
    ActorCritic(build("llama"), None).save_pretrained(directory, tokenizer)
    return directory


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run when it has ended; tests only read it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    runs.run(run_dir)
    return run_dir


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line of error with which a call ends; ``alone``: nothing else is said."""

    def of(
        call: Callable[..., object], *args: Any, code: int = 2, alone: bool = False, **options: Any
    ) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(*args, **options)
        assert stopped.value.code == code
        said = [x for x in capsys.readouterr().err.splitlines() if "Seed set to" not in x]
        errors = [line for line in said if line.startswith("error: ")]
        assert len(said if alone else errors) == len(errors) == 1, said
        return errors[0]

    return of


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a call prints that ends the process well, as --help does."""

    def of(call: Callable[..., object], *args: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(*args)
        out, err = capsys.readouterr()
        assert stopped.value.code == 0 and "error" not in err
        return out

    return of


@pytest.fixture
def make_prompts() -> Callable[[Sequence[int]], PromptBatch]:
    """A batch of random prompts of the given lengths, padded on the left with id 0."""

    def make(lengths: Sequence[int]) -> PromptBatch:
        generator = torch.Generator().manual_seed(1)
        width = max(lengths)
        mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
        ids = torch.randint(3, VOCAB_SIZE, mask.shape, generator=generator) * mask
        return replace(batches.prompt_batch(*[{}] * len(lengths)), prompt_ids=ids, prompt_mask=mask)

    return make


def build(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_language_model(PolicyArgs(architecture=ARCHITECTURES[model_type]))
