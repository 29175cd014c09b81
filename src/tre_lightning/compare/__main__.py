"""Compare methods: ``python -m tre_lightning.compare --config FILE``.

Finished trials are skipped and unfinished ones go on from their last iteration, so the same command
continues a comparison that was stopped.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tre_lightning.common.errors import one_line_errors
from tre_lightning.common.paths import check_directory, expanded, locked
from tre_lightning.compare.curves import write_curves
from tre_lightning.compare.plan import Plan, read_plan
from tre_lightning.compare.report import report
from tre_lightning.compare.run import Runner
from tre_lightning.compare.trial import run_trial


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a comparison; ``args`` defaults to the process's arguments.

    Raises:
        SystemExit: with code 2 for a plan that cannot work, 1 where a trial failed, 130 where
            Ctrl-C or SIGTERM stopped it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tre_lightning.compare",
        description="Run methods x values x seeds of one file, then report; goes on if stopped.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="file of the comparison")
    what.add_argument("--trial", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default: 1)")
    parser.add_argument("--report", action="store_true", help="only make the report again")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    options.config = expanded(options.config)
    if options.trial is not None:
        with one_line_errors():
            if not options.trial.is_file():
                raise ValueError(f"--trial {options.trial} does not exist")
        run_trial(options.trial)
        return
    with one_line_errors():
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs} is below 1; give 1 or more")
        plan = read_plan(options.config)
        runner = Runner(plan, Path(options.config).parent, options.jobs)
        runner.check()
        output = Path(plan.output)
        check_directory("output", plan.output)
        output.mkdir(parents=True, exist_ok=True)
        if not options.report:
            _run(plan, runner, options.config)
        _write_report(plan, options.config)
    if runner.failed:
        print(f"failed: {', '.join(runner.failed)}", file=sys.stderr)
        raise SystemExit(1)


def _run(plan: Plan, runner: Runner, config: str) -> None:
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with locked(Path(plan.output)):
            runner.run()
    except KeyboardInterrupt:
        print(
            f"stopped; go on with python -m tre_lightning.compare --config {config} "
            f"--jobs {runner.jobs}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_report(plan: Plan, config: str) -> None:
    text = report(plan, config)
    output = Path(plan.output)
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    if not write_curves(plan):
        print("no curves.png: matplotlib is missing; pip install 'tre-lightning[docs]'")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
