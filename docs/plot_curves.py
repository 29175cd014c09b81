"""Draw curves of one or more run directories: python docs/plot_curves.py OUT.png RUN [RUN ...].

Needs the `docs` extra (matplotlib). Each panel shows one tag, each line one run.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "pass@1": ("val/pass@1", "val_file/pass@1", "rollout/pass@1"),
    "entropy (nats)": ("entropy/full", "entropy/region"),
    "mass outside the 0.99 nucleus": ("entropy/tail_mass",),
}


def main(out: str, *runs: str) -> None:
    """Read the event files and write the picture."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4), layout="constrained")
    for run in runs:
        events = EventAccumulator(run)
        events.Reload()
        for axis, (title, tags) in zip(axes, PANELS.items(), strict=True):
            for tag in filter(events.Tags()["scalars"].__contains__, tags):
                points = events.Scalars(tag)
                held_out = tag.startswith("val")
                axis.plot(
                    [point.step for point in points],
                    [point.value for point in points],
                    marker="o" if held_out else None,
                    markersize=3,
                    alpha=1.0 if held_out or "rollout" not in tag else 0.35,
                    label=tag if len(runs) == 1 else f"{Path(run).name} {tag}",
                )
            axis.set_title(title)
            axis.set_xlabel("PPO iteration")
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
