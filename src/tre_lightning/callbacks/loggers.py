"""Loggers that write directly into the run directory, and the groups of TensorBoard curves."""

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tre_lightning.common.distributed import world

# Charts of the custom-scalars tab by group; a chart shows the tags that match its patterns.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "score": {
        "score": ["rollout/score$", r"val\w*/score$"],
        "pass@1": ["rollout/pass@1$", r"val\w*/pass@1$"],
        "pass@k": [r"(rollout|val\w*)/(pass|majority)@(?!1$)\d+$"],
    },
    "entropy": {
        "whole vocabulary and region": ["entropy/full$", "entropy/region$"],
        "region, rescaled": ["entropy/region_scaled$"],
    },
    "region": {
        "tokens": ["entropy/region_size$"],
        "fraction of single tokens": ["entropy/single_token_fraction$"],
    },
    "tail": {
        "mass outside the region": ["entropy/tail_mass$"],
        "cumulative risk": ["entropy/cumulative_tail_risk$"],
        "invalid responses": [r"val\w*/invalid_fraction$"],
    },
    "policy": {
        "step": ["policy/approx_kl$", "policy/clip_fraction$"],
        "gradient norm": ["policy/grad_norm$", "value/grad_norm$"],
        "length": ["rollout/response_length$", r"val\w*/response_length$"],
        "critic": ["value/explained_variance$"],
    },
    "methods": {
        "losses": [r"loss/(?!total$)\w+(?<!_coef)$"],
        "effective coefficients": [r"loss/\w+_effective_coef$"],
    },
}


def add_layout(loggers: Iterable[object]) -> None:
    """Group the curves in the custom-scalars tab of the TensorBoard loggers."""
    layout = {
        group: {chart: ["Multiline", patterns] for chart, patterns in charts.items()}
        for group, charts in LAYOUT.items()
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)


class TensorBoard(TensorBoardLogger):
    """A TensorBoardLogger without name and version folders: one run, one directory."""

    def __init__(self, save_dir: str, purge_step: int | None = None, **kwargs: Any) -> None:
        """Set the directory.

        Args:
            save_dir: the run directory.
            purge_step: hide what an earlier process logged from this step on; a run that is resumed
                would else show those steps twice.
            kwargs: options of ``torch.utils.tensorboard.SummaryWriter``.
        """
        super().__init__(
            save_dir,
            name="",
            version="",
            default_hp_metric=False,
            purge_step=purge_step,
            **kwargs,
        )


class CSV(CSVLogger):
    """A CSVLogger whose ``metrics.csv`` lies in the run directory; a resumed run appends to it."""

    def __init__(self, save_dir: str, purge_step: int = 0) -> None:
        """Set the directory.

        Args:
            save_dir: the run directory.
            purge_step: drop what an earlier process logged from this step on.
        """
        super().__init__(save_dir, name="", version="")
        file = Path(save_dir) / "metrics.csv"
        self._kept: list[dict[str, str]] = []
        if purge_step and file.exists():
            with file.open(newline="") as old:
                self._kept = [row for row in csv.DictReader(old) if int(row["step"]) < purge_step]

    @property
    def experiment(self) -> Any:
        """The CSV writer, primed with the rows that are kept from the earlier run."""
        kept, self._kept = self._kept, []
        with warnings.catch_warnings():  # that it deletes the earlier file
            warnings.simplefilter("ignore")
            writer = super().experiment
        if kept and world()[0] == 0:
            Path(writer.metrics_file_path).unlink(missing_ok=True)
            for row in kept:
                writer.log_metrics({k: v for k, v in row.items() if v}, int(row["step"]))
            writer.save()
        return writer
