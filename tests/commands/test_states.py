"""What a checkpoint is to hold can be read back: refused before the run, or at the save."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Timer

import runs
from tre_lightning.callbacks.checkpoint import check_states
from tre_lightning.methods import EntropyBonus

SHORT = "--trainer.max_epochs=1"


class Remembers(EntropyBonus):
    """An entropy bonus with something in its state, from an iteration on."""

    def __init__(self, kind: str, since: int = 0) -> None:
        super().__init__(0.01, name="remembers")
        self.kind = kind
        self.since = since
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        if self.iteration < self.since:
            return {}
        return {"nested": [{"x": HELD[self.kind]}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict


HELD: dict[str, Any] = {
    "float64": np.float64(0.5),
    "int32": np.int32(3),
    "bool": np.bool_(True),
    "tensor": torch.ones(2),
    "array": np.ones(2),
    "path": Path("x"),
    "module": torch.nn.Linear(1, 1),
}


def callbacks(kind: str, since: int = 0) -> dict[str, Any]:
    options = {"class_path": "test_states.Remembers", "init_args": {"kind": kind, "since": since}}
    return {"trainer.callbacks": [options], "summary": {"export": False}}


def test_numbers_of_numpy_become_plain_ones_and_come_back(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", SHORT, changes=callbacks("float64"))
    (state,) = (
        s for key, s in runs.checkpoint(tmp_path / "run")["callbacks"].items() if "Remember" in key
    )
    assert type(state["nested"][0]["x"]) is float
    again = runs.resume(tmp_path / "run", changes=callbacks("float64"))
    (method,) = (c for c in again.trainer.callbacks if isinstance(c, Remembers))
    assert method.loaded == {"nested": [{"x": 0.5}]}


@pytest.mark.parametrize("kind", ["float64", "int32", "bool", "tensor"])
def test_states_that_come_back(kind: str) -> None:
    check_states([Remembers(kind), Timer(), Callback()])


@pytest.mark.parametrize("kind", ["array", "path", "module"])
def test_states_that_do_not(kind: str) -> None:
    with pytest.raises(ValueError, match=r"state_dict\(\) of the callback Remembers\[remembers\]"):
        check_states([Callback(), Remembers(kind)])


def test_refused_before_the_run(tmp_path: Path, refusal: runs.Said) -> None:
    assert "Remembers[remembers] cannot be read back" in refusal(
        runs.run, tmp_path / "run", changes=callbacks("array")
    )
    assert not (tmp_path / "run").exists()


def test_noticed_at_the_save_and_the_earlier_one_stays(tmp_path: Path, refusal: runs.Said) -> None:
    line = refusal(runs.run, tmp_path / "run", changes=callbacks("array", since=2), code=1)
    assert "Remembers[remembers] cannot be read back" in line and "--ckpt_path last" in line
    assert runs.saved_iteration(tmp_path / "run") == 2
    assert {f.name for f in (tmp_path / "run" / "checkpoints").iterdir()} <= {
        *("last.ckpt", "previous.ckpt", "best.ckpt")
    }


class Elsewhere(Callback):
    """Puts something into the checkpoint itself."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["mine"] = collections.ChainMap()


def test_what_no_callback_has_in_its_state_is_noticed_too(
    tmp_path: Path, refusal: runs.Said
) -> None:
    changes = {"trainer.callbacks": [{"class_path": "test_states.Elsewhere"}]}
    line = refusal(runs.run, tmp_path / "run", changes=changes, code=1)
    assert "the checkpoint could not be read back" in line
