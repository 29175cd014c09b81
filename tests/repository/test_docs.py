"""What the docs promise: every metric and method is there, and the code that they show works."""

import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import batches
import runs
import tre_lightning
from tre_lightning import methods
from tre_lightning.methods import LossTerm, PolicyOutputs
from tre_lightning.tasks.mathematics.scorer import score_math
from tre_lightning.tasks.walks.scorer import score_walk


def test_metrics_page_defines_exactly_what_a_run_logs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    puzzles = tmp_path_factory.mktemp("data") / "eval.jsonl"
    puzzles.write_text('{"nums": [3, 4, 5], "target": 17}\n')
    weighing = {"class_path": "tre_lightning.methods.ForkingTokens", "init_args": {"fraction": 0.5}}
    changes = {
        "trainer.callbacks": [runs.TRE, weighing],
        "model.rollout": {"num_responses": 8, "max_new_tokens": 8},
        "model.evaluation": {"num_responses": 8},
        "data.init_args.eval_file": str(puzzles),
        "model.ppo.kl_coef": 0.01,
        "model.ppo.kl_in": "loss",
        "model.ppo.kl_estimator": "k3",
        "trainer.max_epochs": 1,
    }
    runs.run(tmp_path / "run", changes=changes)
    logged = set(runs.scalars(tmp_path / "run")) | set(runs.CLOCKS)
    others = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    logged |= {*others["histograms"], *others["images"]}
    # The page describes the four held-out sets once.
    logged = {re.sub("^val_file/", "val/", tag) for tag in logged} | {"val/samples", "sft/loss"}
    page = (runs.ROOT / "docs" / "metrics.md").read_text()
    defined = set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    assert defined == logged
    assert runs.texts(tmp_path / "run", "val/samples")


def test_methods_page_has_every_method_with_its_defaults() -> None:
    page = (runs.ROOT / "docs" / "methods.md").read_text()
    files = {file.stem for file in (runs.ROOT / "configs" / "method").glob("*.yaml")}
    assert set(re.findall(r"\(\.\./configs/method/(\w+)\.yaml\)", page)) == files
    readme = (runs.ROOT / "README.md").read_text()
    assert all(re.search(rf"\b{name}\b", readme) for name in files)
    rows = re.findall(r"^\| \[(\w+)\]\(.*\| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    written = {name: re.findall(r"`(\w+)` (-?[\d.]\S*?)(?=[, ]|$)", cell) for name, cell in rows}
    of_this_package = {
        name: kind
        for name, kind in vars(methods).items()
        if inspect.isclass(kind) and issubclass(kind, methods.Method) and name in methods.__all__
    }
    assert written.keys() == of_this_package.keys() - {"Method", "LossTerm"}
    for name, cells in written.items():
        options = inspect.signature(of_this_package[name]).parameters
        assert cells, name
        for option, value in cells:
            assert options[option].default == float(value), (name, option)


def test_configuration_page_is_what_the_parser_says() -> None:
    script = runpy.run_path(str(runs.ROOT / "docs" / "configuration.py"))
    written = script["PAGE"].read_text()
    assert script["page"]() == written, "run python docs/configuration.py"
    assert "| `model.ppo.num_minibatches` | int | `4` | optimiser steps a pass. |" in written


def test_tables_of_the_pages_are_what_the_results_say() -> None:
    script = runpy.run_path(str(runs.ROOT / "docs" / "results.py"))
    pages = [page.read_text() for page in script["PAGES"]]
    for page in pages:
        assert script["filled"](page) == page, "run python docs/results.py"
        assert page.count("<!-- end -->") == len(script["MARKED"].findall(page))
    used = {name for page in pages for name, *_ in script["MARKED"].findall(page)}
    assert {file.stem for file in script["RESULTS"].glob("*.json")} == used
    name, *_ = sorted(used)
    filled = script["filled"](f"<!-- {name} final -->\nold\n<!-- end -->")
    assert "old" not in filled and "| ppo |" in filled and filled.endswith("\n<!-- end -->")


def block(page: str) -> str:
    """The Python of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", (runs.ROOT / page).read_text(), re.DOTALL)
    return str(code)


def test_readme_ops_give_gradients() -> None:
    lm_head = torch.nn.Linear(4, 9, bias=False)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.randint(9, (2, 3))
    names = {"hidden": hidden, "lm_head": lm_head, "labels": labels, "policy_loss": torch.sum}
    exec(block("README.md"), names)
    assert hidden.grad is not None and hidden.grad.any()
    assert lm_head.weight.grad is not None and lm_head.weight.grad.any()


def test_method_of_the_docs_is_a_loss_term() -> None:
    names: dict[str, object] = {}
    exec(block("docs/add_a_method.md"), names)
    term = names["ConfidencePenalty"](coef=0.5)  # type: ignore[operator]
    assert isinstance(term, LossTerm) and term.coef_at(3) == 0.5
    logprobs = torch.tensor([-1.0, -2.0])
    assert torch.equal(term.per_token(PolicyOutputs(logprobs, {}), batches.tokens(2)), logprobs)
    assert term.name == "confidence"


@pytest.mark.parametrize("page", ["tasks.md", "math_scorer.md"])
def test_math_scores_are_as_the_comments_say(page: str) -> None:
    text = (runs.ROOT / "docs" / page).read_text()
    calls = re.findall(r"^(score_math\(.*\))  # (\d\.\d)", text, re.MULTILINE)
    assert {score for _, score in calls} == {"0.0", "1.0"}
    for call, score in calls:
        assert eval(call, {"score_math": score_math}) == float(score), call  # our own docs


def test_walk_scores_are_as_the_comments_say() -> None:
    text = (runs.ROOT / "docs" / "tasks.md").read_text()
    calls = re.findall(r"^(score_walk\(.*\))  # (\d\.\d)", text, re.MULTILINE)
    assert [score for _, score in calls] == ["1.0", "1.0", "0.0", "0.0"]
    for call, score in calls:
        assert eval(call, {"score_walk": score_walk}) == float(score), call  # our own docs


def test_examples_of_the_api_page_print_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (runs.ROOT / "docs" / "api.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")
    printed: list[str] = []
    names = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)  # one after another, as the page says
    said = re.findall(r"^print\(.*\)  # (.*)$", page, re.MULTILINE)
    assert printed == [line.split(": ")[0] for line in said]
    public = set(re.findall(r"^## (\w+)$", page, re.MULTILINE))
    assert public == set(vars(tre_lightning)["__all__"]) - {"__version__"}
