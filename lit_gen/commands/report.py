"""A run or a sweep as one HTML file that needs nothing else: curves, pictures, numbers, configuration."""

import base64
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf

from lit_gen import __version__, runs
from lit_gen.cli import check_at_least_1, entry_point
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import with_error
from lit_gen.figures import panel_svg
from lit_gen.metrics import Estimate
from lit_gen.runs import redacted

PANELS = {
    "loss": ("train/loss", "val/loss"),
    "loss by noise level": tuple(f"train/loss_noise_q{i}" for i in range(1, 5)),
    "gradient norm": ("train/grad_norm",),
    "learning rate": ("train/lr",),
    "images per second": ("throughput/images_per_second",),
    "peak memory in GiB": ("memory/peak_gib",),
}


_Section = dict[str, Any]
"""What report.html.j2 shows below a title: text, command, table with columns, plots, pictures, details."""


def report(cfg: DictConfig) -> Path:
    """Writes the report of `cfg.run` and returns its path. Raises ConfigError for what is neither a run nor a
    sweep."""
    folder = Path(cfg.run)
    check_at_least_1(cfg, "grids")
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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        folder=str(folder.resolve()),
        sections=[s for s in sections if any(value for key, value in s.items() if key != "title")],
        version=__version__,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(out, page)
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return out


def _yaml(config: Any) -> str:
    """Without secrets; empty if there is nothing."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted(config))) if config else ""


def _trials(folder: Path) -> list[Path]:
    """The run folders of a sweep, by number."""
    found = [path.parent for path in folder.glob("*/config.yaml") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _of_run(folder: Path, grids: int) -> list[_Section]:
    results = [[name, _number(value)] for name, value in runs.summary(folder).items() if name != "fd_name"]
    return [
        {"title": "Result", "table": results},
        {"title": "Evaluation", **_evaluation(folder)},
        {"title": "Curves", "plots": _curves({"": runs.history(folder)})},
        {
            "title": "Pictures",
            "text": "Always the same seeds; the slider goes back in the training.",
            "pictures": [_sequence(paths, grids) for paths in _kinds(folder).values()],
        },
        {"title": "Environment", "details": _yaml(runs.read_json(folder / "environment.json"))},
        {"title": "Configuration", "details": _yaml(OmegaConf.to_container(runs.saved_config(folder)))},
    ]


def _of_sweep(folder: Path, trials: Sequence[Path], grids: int) -> list[_Section]:
    record = runs.read_json(folder / "sweep.json")
    objective, told = record.get("objective", "objective"), record.get("trials", ())
    configs = {path.name: runs.saved_config(path) for path in trials}
    different = redacted(runs.differences(configs)) if len(configs) > 1 else {}
    states = {str(trial["number"]): trial["state"] for trial in told}
    values = {path.name: runs.summary(path).get(objective) for path in trials}
    sign = -1 if record.get("direction") == "maximize" else 1
    known: dict[str, float] = {name: value for name, value in values.items() if value is not None}
    best_first = sorted(known, key=lambda name: sign * known[name]) + [n for n in values if n not in known]
    rows = [
        [name, states.get(name, ""), _number(values[name]), *(_number(v[name]) for v in different.values())]
        for name in best_first
    ]
    plots = [_picture(folder / name) for name in ("slices.png", "importance.png")]
    failed = [[str(trial["number"]), redacted(trial["error"])] for trial in told if trial.get("error")]
    sections: list[_Section] = [
        {"title": "Trials", "columns": ["trial", "state", objective, *different], "table": rows},
        {"title": "What matters", "pictures": [[picture] for picture in plots if picture]},
        {"title": "Curves", "plots": _curves({path.name: runs.history(path) for path in trials})},
        {"title": "Failed", "columns": ["trial", "error"], "table": failed},
    ]
    if best := record.get("best"):
        text, command = f"Trial {best['number']}: {best['value']:.5g}", redacted(best["command"])
        sections.insert(0, {"title": "Best", "text": text, "command": command})
    shown = str(best["number"]) if best else best_first[0]
    if shown in configs:
        for section in _of_run(folder / shown, grids):
            sections.append(section | {"title": f"Trial {shown}: {section['title'].lower()}"})
    return sections


def _evaluation(folder: Path) -> dict[str, Any]:
    """The newest of the run's evaluations."""
    files = sorted(folder.glob("evaluation/*/evaluation.json"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return {}
    record = runs.read_json(files[-1])
    rows = []
    for entry in record.get("results", ()):
        value = math.nan if entry["value"] is None else entry["value"]
        rows.append([entry["key"], with_error(Estimate(value, entry["se"]))])
    picture = _picture(files[-1].parent / "nearest.png", "samples and the training images nearest to them")
    about = f"{record.get('n_fake')} samples, seed {record.get('seed')}, against {record.get('reference')}."
    return {"text": about, "table": rows, "pictures": [[picture]] if picture else []}


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


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


main = entry_point("report")(report)

if __name__ == "__main__":
    main()
