"""A run folder: claimed, read, and written to.

A run folder holds `config.yaml` (resolved), `checkpoints/`, `grids/`, `wandb/`, `metrics.csv` and
`summary.json`. `lit-gen export` makes another kind, of weights and configuration alone.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_gen import checkpoints
from lit_gen.errors import ConfigError
from lit_gen.instantiate import up_to_date

RENAMED = {"confident_share": "confident_fraction", "fd_floor": "fd_train_test", "judge/": "classifier/"}
"""Names of numbers in runs of earlier versions -> their names today."""

LIBRARY, WEIGHTS, CONFIG = "lit_gen", "model.safetensors", "config.json"
"""What an exported folder says that it is of, and its files."""

_SECRET = re.compile(r"(api_?key|token|password|passwd|secret|credential)", re.IGNORECASE)
_IN_URL = re.compile(r"(\w+://[^:/@\s]+):[^@/\s]+@")
_ASSIGNED = re.compile(  # key=value, in quotes or not, where the value is no number
    rf"(?P<quote>['\"]?)(?P<key>[\w.+~-]*{_SECRET.pattern}[\w.-]*=)(?!-?[\d.]+(?:[\s&'\"]|$))"
    r"(?:'[^']*'|\"[^\"]*\"|\S.*?)(?P=quote)(?=[\s&]|$)",
    re.IGNORECASE,
)
_SPELLED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # numbers that JSON has not


def claim(folder: Path, resume: bool) -> None:
    """Makes the run folder ours. Raises ConfigError if it holds another run or cannot be written."""
    if (folder / "config.yaml").exists() and not resume:
        raise ConfigError(
            f"{folder} already holds a run: continue it with resume={folder}, "
            "or choose another hydra.run.dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"The run folder {folder} cannot be written: {error.strerror}.") from error


def saved_config(run: str | Path) -> DictConfig:
    """The resolved configuration of a run folder or of a checkpoint file, by the names of today."""
    path = Path(run)
    if checkpoints.is_checkpoint(path):
        return config_of(checkpoints.read(path, sharded=False)["config"])
    if not path.is_dir():
        raise ConfigError(f"There is no run folder {path}.")
    if is_exported(path):
        return config_of(_numbers(read_json(path / CONFIG)["run"]))
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is not a run folder of lit_gen: it has no config.yaml.")
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.yaml'} holds a list: it is not the configuration of a run.")
    return config_of(config)


def is_exported(path: Path) -> bool:
    """Whether `lit-gen export format=safetensors` has written the folder."""
    return (path / WEIGHTS).is_file() and read_json(path / CONFIG).get("library_name") == LIBRARY


def spelled(config: Any) -> Any:
    """Plain containers with infinity and NaN as words, for strict JSON; `saved_config` reads them."""
    if isinstance(config, dict):
        return {key: spelled(value) for key, value in config.items()}
    if isinstance(config, list):
        return [spelled(value) for value in config]
    return str(config) if isinstance(config, float) and not math.isfinite(config) else config


def _numbers(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _numbers(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_numbers(value) for value in config]
    return _SPELLED.get(config, config) if isinstance(config, str) else config


def config_of(saved: dict[Any, Any]) -> DictConfig:
    """A configuration that a run has saved, by the names of today. Earlier versions kept what is now
    `metrics` with the callbacks."""
    config = up_to_date(saved)
    if "metrics" not in config:
        callbacks = config.get("callbacks") or {}
        quality, translations, checkpoint = (
            callbacks.get(name) or {} for name in ("quality", "translations", "checkpoint")
        )
        config["metrics"] = {
            "extractor": quality.get("extractor"),
            "classifier": quality.get("classifier"),
            "classifiers": translations.get("classifiers"),
            "objective": checkpoint.get("monitor"),
            "mode": checkpoint.get("mode", "min"),
        }
    return DictConfig(config)


def redacted(config: Any) -> Any:
    """The containers without what looks like a secret: values of keys named so, also in key=value, passwords
    in URLs, and the API key of this environment."""
    if isinstance(config, dict):
        return {
            k: "(hidden)" if _SECRET.search(str(k)) and isinstance(v, str) and v else redacted(v)
            for k, v in config.items()
        }
    if isinstance(config, list):
        return [redacted(v) for v in config]
    if isinstance(config, str):
        own = os.environ.get("WANDB_API_KEY")
        shown = _IN_URL.sub(r"\1:(hidden)@", config.replace(own, "(hidden)") if own else config)
        return _ASSIGNED.sub(r"\g<key>(hidden)", shown)
    return config


def yaml_text(config: Any) -> str:
    """A configuration, or plain containers, as YAML without secrets; "" if there is nothing."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted(config))) if config else ""


def evaluations(run: Path) -> list[Path]:
    """The `evaluation.json` of a run's evaluations, the newest first."""
    found = run.glob("evaluation/*/evaluation.json")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def write_whole(path: Path, text: str) -> Path:
    """The file as it was before or with this text, at any moment and whatever happens."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def write_json(path: Path, record: Any) -> Path:
    """`write_whole` of a record."""
    return write_whole(path, json.dumps(record, indent=2) + "\n")


def history(run: str | Path) -> dict[str, dict[int, float]]:
    """Logged numbers of a run over all its launches: name -> {batches seen: value}; later launches win.

    Names of earlier versions are today's (`RENAMED`). The run may be training meanwhile: a last line that is
    not written to its end is left out. Runs of before `metrics.csv` have `csv/version_<launch>/metrics.csv`,
    a column a name.
    """
    result: dict[str, dict[int, float]] = {}
    run = Path(run)
    for file in sorted(run.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        names, *rows = _whole_rows(file) or [[]]
        if "step" not in names:
            continue  # Lightning's logger, caught at writing its file anew
        for row in rows:
            cells = dict(zip(names, row, strict=False))
            step = int(cells.pop("step"))
            for name, value in cells.items():
                if value:
                    result.setdefault(_renamed(name), {})[step] = float(value)
    if (run / "metrics.csv").is_file():
        for step, name, value in _whole_rows(run / "metrics.csv")[1:]:
            result.setdefault(_renamed(name), {})[int(step)] = float(value)
    return result


def summary(run: str | Path) -> dict[str, Any]:
    """`summary.json` of a run that has ended, by the names of today; empty without one. Raises ConfigError if
    it is damaged."""
    return {_renamed(name): value for name, value in read_json(Path(run) / "summary.json").items()}


def read_json(path: Path) -> dict[str, Any]:
    """The record in a file; empty if there is no such file. Raises ConfigError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it.") from error


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def _whole_rows(path: Path) -> list[list[str]]:
    text = path.read_bytes()
    return list(csv.reader(text[: text.rfind(b"\n") + 1].decode().splitlines()))


def differences(configs: dict[str, DictConfig]) -> dict[str, dict[str, Any]]:
    """What the configurations do not share: dotted key -> {run: value}. Paths of the run folders are left
    out, they always differ."""
    flat = {name: dict(_leaves(OmegaConf.to_container(config))) for name, config in configs.items()}
    keys = sorted({key for leaves in flat.values() for key in leaves})
    different = {}
    for key in keys:
        values = {name: leaves.get(key, "-") for name, leaves in flat.items()}
        if len({repr(v) for v in values.values()}) > 1 and not key.startswith(("logger.", "resume")):
            different[key] = values
    return different


def _leaves(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{at}.{key}" if at else str(key))
    else:
        yield at, node
