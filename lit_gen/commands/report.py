"""A run or a sweep as one HTML file that needs nothing else: curves, pictures, numbers, configuration."""

import base64
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf

from lit_gen import __version__, runs
from lit_gen.cli import entry_point
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import with_error
from lit_gen.figures import panel_svg
from lit_gen.metrics import Estimate

__all__ = ["redacted", "report"]

SECRET = re.compile(r"(api_?key|token|password|passwd|secret|credential)", re.IGNORECASE)
IN_URL = re.compile(r"(\w+://[^:/@\s]+):[^@/\s]+@")
PANELS = {
    "loss": ("train/loss", "val/loss"),
    "loss by noise level": tuple(f"train/loss_noise_q{i}" for i in range(1, 5)),
    "gradient norm": ("train/grad_norm",),
    "learning rate": ("train/lr",),
    "images per second": ("throughput/images_per_second",),
    "peak memory in GiB": ("memory/peak_gib",),
}


@dataclass
class _Section:
    title: str
    text: str = ""
    command: str = ""
    columns: Sequence[str] = ()
    table: list[list[str]] = field(default_factory=list)
    plots: list[Markup] = field(default_factory=list)
    pictures: list[list[dict[str, str]]] = field(default_factory=list)
    details: str = ""

    @property
    def empty(self) -> bool:
        return not (self.text or self.command or self.table or self.plots or self.pictures or self.details)


def report(cfg: DictConfig) -> Path:
    """Writes the report of `cfg.run` and returns its path. Raises ConfigError for what is neither a run nor a
    sweep."""
    folder = Path(cfg.run)
    if cfg.grids < 1:
        raise ConfigError(f"grids={cfg.grids}: must be at least 1.")
    if not folder.is_dir():
        raise ConfigError(f"run={cfg.run}: there is no such folder.")
    trials = _trials(folder)
    if not (folder / "config.yaml").is_file() and not trials:
        raise ConfigError(f"{folder} is neither a run folder nor one of a sweep: it holds no config.yaml.")
    out = Path(cfg.out) if cfg.out else folder / "report.html"
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder: name a file.")
    if (folder / "config.yaml").is_file():
        title, sections = runs.saved_config(folder).name, _of_run(folder, cfg.grids)
    else:
        title, sections = f"sweep {folder.name}", _of_sweep(folder, trials, cfg.grids)
    page = _template().render(
        title=title,
        folder=str(folder.resolve()),
        sections=[section for section in sections if not section.empty],
        version=__version__,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(out)
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return out


def redacted(config: Any) -> Any:
    """The containers without what looks like a secret: values of keys named so, passwords in URLs, and the
    API key of this environment."""
    if isinstance(config, dict):
        return {
            k: "(hidden)" if SECRET.search(str(k)) and isinstance(v, str) and v else redacted(v)
            for k, v in config.items()
        }
    if isinstance(config, list):
        return [redacted(v) for v in config]
    if isinstance(config, str):
        own = os.environ.get("WANDB_API_KEY")
        return IN_URL.sub(r"\1:(hidden)@", config.replace(own, "(hidden)") if own else config)
    return config


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def _trials(folder: Path) -> list[Path]:
    """The run folders of a sweep, by number."""
    found = [path.parent for path in folder.glob("*/config.yaml") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _of_run(folder: Path, grids: int) -> list[_Section]:
    config, history = runs.saved_config(folder), runs.history(folder)
    summary = runs.summary(folder)
    return [
        _Section(
            "Result", table=[[name, _number(value)] for name, value in summary.items() if name != "fd_name"]
        ),
        _evaluation(folder),
        _Section("Curves", plots=_curves({"": history})),
        _Section(
            "Pictures",
            "Always the same seeds; the slider goes back in the training.",
            pictures=[_sequence(paths, grids) for paths in _kinds(folder).values()],
        ),
        _Section("Environment", details=_environment(folder)),
        _Section("Configuration", details=OmegaConf.to_yaml(OmegaConf.create(_plain(config)))),
    ]


def _of_sweep(folder: Path, trials: Sequence[Path], grids: int) -> list[_Section]:
    record = _json(folder / "sweep.json")
    configs = {path.name: runs.saved_config(path) for path in trials}
    different = redacted(runs.differences(configs)) if len(configs) > 1 else {}
    summaries = {path.name: runs.summary(path) for path in trials}
    states = {str(t["number"]): t["state"] for t in record.get("trials", ())}
    values = {name: summary.get(record.get("objective", "fd")) for name, summary in summaries.items()}

    def place(name: str) -> float:
        value = values[name]
        return math.inf if value is None else float(value)

    rows = [
        [name, states.get(name, ""), _number(values[name]), *(_number(v[name]) for v in different.values())]
        for name in sorted(configs, key=place)
    ]
    best = record.get("best") or {}
    plots = [_picture(folder / name) for name in ("slices.png", "importance.png")]
    sections = [
        _Section("Best", f"Trial {best['number']}: {best['value']:.5g}", redacted(best["command"]))
        if best
        else _Section("Best"),
        _Section(
            "Trials",
            columns=["trial", "state", record.get("objective", "fd"), *different],
            table=rows,
        ),
        _Section("What matters", pictures=[[p] for p in plots if p]),
        _Section("Curves", plots=_curves({path.name: runs.history(path) for path in trials})),
    ]
    failed = [[str(t["number"]), redacted(t["error"])] for t in record.get("trials", ()) if t.get("error")]
    sections.append(_Section("Failed", columns=["trial", "error"], table=failed))
    shown = str(best["number"]) if best else rows[0][0] if rows else None
    if shown in configs:
        for section in _of_run(folder / shown, grids):
            section.title = f"Trial {shown}: {section.title.lower()}"
            sections.append(section)
    return sections


def _evaluation(folder: Path) -> _Section:
    """The newest of the run's evaluations."""
    files = sorted(folder.glob("evaluation/*/evaluation.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return _Section("Evaluation")
    record = _json(files[-1])
    rows = [
        [
            entry["key"],
            with_error(Estimate(np.nan if entry["value"] is None else entry["value"], entry["se"])),
        ]
        for entry in record.get("results", ())
    ]
    picture = _picture(files[-1].parent / "nearest.png", "samples and the training images nearest to them")
    about = f"{record.get('n_fake')} samples, seed {record.get('seed')}, against {record.get('reference')}."
    return _Section("Evaluation", about, table=rows, pictures=[[picture]] if picture else [])


def _environment(folder: Path) -> str:
    found = redacted(_json(folder / "environment.json"))
    return OmegaConf.to_yaml(OmegaConf.create(found)) if found else ""


def _curves(histories: dict[str, dict[str, dict[int, float]]]) -> list[Markup]:
    """A panel for each kind of number; with several runs a curve for each of them."""
    logged = {name for history in histories.values() for name in history}
    distances = sorted(n for n in logged if n.startswith(("fd_", "fid", "kd_", "kid")))
    panels = {
        name: (name,) for name in distances if any(len(h.get(name, ())) > 1 for h in histories.values())
    }
    panels |= {title: tuple(n for n in names if n in logged) for title, names in PANELS.items()}
    known = {name for names in panels.values() for name in names}
    others = sorted(n for n in logged - known if n.startswith(("train/", "val/", "samples/", "k_shot/")))
    panels |= {name: (name,) for name in others}
    drawings = []
    for title, names in panels.items():
        lines = [
            (run or name, history[name], history.get(f"se/{name}", {}))
            for run, history in histories.items()
            for name in names
            if name in history
        ]
        legend = len(names) > 1 or 1 < len(histories) <= 12
        if lines:  # names are escaped by matplotlib
            drawings.append(Markup(panel_svg(title, lines, legend)))
    return drawings


def _kinds(folder: Path) -> dict[str, list[Path]]:
    """The pictures of `grids/`, `<kind>_<batches>.png`, by kind and in order."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("grids/*.png")):
        kinds.setdefault(path.stem.rpartition("_")[0], []).append(path)
    return kinds


def _sequence(paths: Sequence[Path], most: int) -> list[dict[str, str]]:
    """At most so many of the pictures, evenly spread, the last among them."""
    chosen = np.unique(np.linspace(len(paths) - 1, 0, min(most, len(paths))).round().astype(int))
    shown = []
    for path in (paths[i] for i in chosen):
        kind, _, batches = path.stem.rpartition("_")
        shown.append(_picture(path, f"{kind}, batch {int(batches) if batches.isdigit() else batches}"))
    return shown


def _picture(path: Path, caption: str = "") -> dict[str, str] | None:
    if not path.is_file():
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return {"source": f"data:image/png;base64,{data}", "caption": caption or path.stem}


def _plain(config: DictConfig) -> Any:
    return redacted(OmegaConf.to_container(config))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it and make the report again.") from error


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@entry_point("report")
def main(cfg: DictConfig) -> None:
    """The command line's."""
    report(cfg)


if __name__ == "__main__":
    main()
