"""Configuration files that build on others (``layers:``).

``layers: [paper.yaml, ../task/math.yaml]`` at the top of a file names files, relative to it, that
come before its own values, in this order; they may have layers themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tre_lightning.common.paths import expanded


def with_layers(words: Sequence[str]) -> list[str]:
    """The command line with one ``--config`` per layer in place of each ``--config FILE``.

    The file itself comes last, as text without ``layers``, so that the parser merges all of them as
    if they were given one by one. Other words stay as they are.

    Raises:
        ValueError: if a layer does not exist or leads back to the file.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        option, joined, value = word.partition("=")
        if option not in ("--config", "-c"):
            found.append(word)
            continue
        value = expanded(value if joined else next(rest, ""))
        found += [f"--config={layer}" for layer in _layers(value, ())] if value else [word]
    return found


def read_config(given: str) -> Any:
    """A configuration file, or a configuration as text, as plain containers."""
    return OmegaConf.to_container(
        OmegaConf.load(given) if _is_file(given) else OmegaConf.create(given)
    )


def _layers(given: str, above: tuple[Path, ...]) -> list[str]:
    """The layers of a file, itself last; ``above`` are the files that led to it."""
    try:
        config: Any = read_config(given) if _is_file(given) else None
    except Exception:  # the parser will say what is wrong
        return [given]
    if not isinstance(config, dict) or "layers" not in config:
        return [given]
    file, layers = Path(given), config.pop("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ValueError(f"{given}: layers={layers} is no list of files; write layers: [FILE, ...]")
    trail = (*above, file.resolve())
    found: list[str] = []
    for layer in expanded(layers):
        path = file.parent / layer
        if not path.is_file():
            raise ValueError(
                f"{given}: layers names {layer}, but {path} does not exist; give files relative to "
                f"{file.name}"
            )
        if path.resolve() in trail:
            raise ValueError(
                f"{given}: layers names {layer}, which builds on {file.name} itself; drop one of "
                "the two"
            )
        found += _layers(str(path), trail)
    return [*found, OmegaConf.to_yaml(OmegaConf.create(config))]


def _is_file(given: str) -> bool:
    """Whether this names a file rather than being a configuration as text."""
    return "\n" not in given and Path(given).is_file()
