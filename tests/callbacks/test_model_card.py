"""Tests of tre_lightning.callbacks.model_card, and of the card that a run writes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import runs
from tre_lightning.callbacks.model_card import describe, hub_name, model_card
from tre_lightning.cli.main import main
from tre_lightning.methods import ClipCov, EntropyBonus, LinearSchedule, TrustRegionEntropy

FACTS: dict[str, Any] = {
    "base_model": "owner/name-1.5B",
    "task": "MathDataModule",
    "methods": ["TrustRegionEntropy (coef 0.001, top_p 0.99)", "Other (coef 1)"],
    "adapters": "LoRA of rank 16",
    "iterations": 80,
    "seed": 42,
    "before": {"val/pass@1": 0.25},
    "after": {"val/pass@1": 0.5, "val_file/pass@1": 1 / 3},
    "config": "seed_everything: 42\nmodel:\n  policy: {}\n",
}


def test_a_card_in_full() -> None:
    assert (
        model_card(**FACTS)
        == """\
---
base_model: owner/name-1.5B
library_name: transformers
pipeline_tag: text-generation
tags:
- reinforcement-learning
- ppo
- tre-lightning
---

# Policy trained by tre-lightning

- Base model: owner/name-1.5B
- Task: MathDataModule
- Method: PPO with TrustRegionEntropy (coef 0.001, top_p 0.99) and Other (coef 1)
- Trained weights: LoRA of rank 16, merged
- PPO iterations: 80
- Seed: 42

## Held-out prompts

| metric | before | after |
| --- | --- | --- |
| val/pass@1 | 0.250 | 0.500 |
| val_file/pass@1 |  | 0.333 |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
```

## Configuration

Save it as `config.yaml` and run it again with `python -m tre_lightning fit --config config.yaml`.

```yaml
seed_everything: 42
model:
  policy: {}
```
"""
    )


def test_a_card_of_little() -> None:
    nothing = {"base_model": None, "methods": [], "adapters": None, "before": {}, "after": {}}
    card = model_card(**{**FACTS, **nothing, "config": ""})
    assert "base_model" not in card and "Base model" not in card
    assert "- Method: PPO, no loss term\n- Trained weights: all\n" in card
    assert "## Held-out" not in card and "## Configuration" not in card
    assert "\n\n\n" not in card and card.endswith("```\n")


def test_a_fence_in_the_configuration_does_not_end_it() -> None:
    config = "instruction: |\n  Answer in\n  ```\n  ````text\n"
    card = model_card(**{**FACTS, "config": config})
    assert f"\n`````yaml\n{config}`````\n" in card


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("owner/name-1.5B", "owner/name-1.5B"),
        (None, None),
        ("/models/name", None),
        ("runs/warm/model", None),
        ("model", None),
        ("a b/c", None),
        ("owner/name\nlicense: mit", None),
    ],
)
def test_only_a_hub_name_is_a_base_model(model: str | None, expected: str | None) -> None:
    assert hub_name(model) == expected


def test_a_directory_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_name("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") is None


def test_terms_are_described_by_coefficient_and_region() -> None:
    assert (
        describe(TrustRegionEntropy(0.001, top_k=2)) == "TrustRegionEntropy (coef 0.001, top_k 2)"
    )
    assert (
        describe(TrustRegionEntropy(0.5, top_p=0.9)) == "TrustRegionEntropy (coef 0.5, top_p 0.9)"
    )
    minimal = TrustRegionEntropy(0.5, min_p=0.1)
    assert describe(minimal) == "TrustRegionEntropy (coef 0.5, min_p 0.1)"
    schedule = LinearSchedule(0.02, 0.0, 50)
    assert describe(EntropyBonus(schedule)) == (
        "EntropyBonus (coef LinearSchedule(start=0.02, end=0.0, iterations=50), whole vocabulary)"
    )


def test_options_that_are_not_the_default_are_described() -> None:
    assert describe(ClipCov()) == "ClipCov"
    assert describe(ClipCov(0.002)) == "ClipCov (fraction 0.002)"
    assert (
        describe(TrustRegionEntropy(0.001, top_k=2, rescale=False, name="second"))
        == "TrustRegionEntropy (coef 0.001, top_k 2, rescale False)"
    )


def test_a_run_writes_its_card(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    runs.run(run_dir, "--seed_everything=7")
    text = (run_dir / "model" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert "ppo" in card.data.tags
    scores = runs.scalars(run_dir)
    for tag in ("val/pass@1", "val/pass@2"):
        (_, before), *_, (_, after) = scores[tag]
        assert f"| {tag} | {before:.3f} | {after:.3f} |" in text
    for line in (
        "- Task: PlusCountdown",
        "- Method: PPO with TrustRegionEntropy (coef 0.01, top_p 0.9)",
        f"- PPO iterations: {runs.ITERATIONS}",
        "- Seed: 7",
    ):
        assert f"\n{line}\n" in text
    # No path but those of the configuration, which is the run's own and works.
    head, config = text.split("```yaml\n")
    assert str(tmp_path) not in head
    config = config.removesuffix("```\n")
    assert yaml.safe_load(config) == yaml.safe_load((run_dir / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(config)
    other = f"--trainer.default_root_dir={tmp_path}/other"
    main(["fit", "--config", f"{tmp_path}/config.yaml", other])
    assert runs.distance(runs.weights(tmp_path / "other"), runs.weights(run_dir)) == 0.0


def test_no_card_without_an_export(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "--summary.export=false", "--trainer.max_epochs=1")
    assert not (tmp_path / "run" / "model").exists()
