"""TensorBoard logs that lie directly in the run directory."""

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


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
