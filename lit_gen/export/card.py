"""The model card of an exported folder (Mitchell et al. 2018, https://arxiv.org/abs/1810.03993), with the
metadata that the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards)."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from lit_gen import __version__, runs
from lit_gen.evaluation.samples import results_of, with_error
from lit_gen.export.source import Source, Usage, portable
from lit_gen.metrics import Estimate
from lit_gen.score.module import ScoreModule
from lit_gen.score.translation import TranslationModule

CARD, PICTURE = "README.md", "grid.png"
_SAMPLES = re.compile(r"_n(\d+)")

Row = tuple[str, Estimate, int | None]
"""The name of a number, its value and standard error, and the number of generated images, if it has one."""


def write_card(
    source: Source,
    folder: Path,
    usage: Usage,
    *,
    name: str,
    pushed: str | None,
    license: str | None,
    data_license: str | None,
) -> None:
    """`README.md`, and of a run its last picture, `grid.png`, into a folder that will be called `name`, or
    lie on the hub as `pushed`; the licenses are what the user says of the weights and of the data."""
    picture = _picture(source)
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)
    rows, told = _results(source)
    sections = [
        _front_matter(source, usage, rows, license),
        f"# {source.name}\n\n{_introduction(source)}",
        f"![What the model generates]({PICTURE})" if picture is not None else "",
        f"## Use\n\n```python\n{_lines(usage, name, pushed)}\n```\n\n{usage.notes}",
        "## Training\n\n" + "\n".join(f"- {name}: {text}" for name, text in _training(source).items()),
        "\n\n".join(part for part in ("## Results", _table(rows), told) if part),
        f"## Licenses\n\n- weights: {license or 'not stated'}\n"
        f"- training data: {data_license or 'not stated'}",
        _configuration(source),
    ]
    runs.write_whole(folder / CARD, "\n\n".join(s.strip() for s in sections if s).strip() + "\n")


def _lines(usage: Usage, name: str, pushed: str | None) -> str:
    if pushed is None or usage.library == "diffusers":  # which reads the hub itself
        return usage.lines.replace("{here}", f'"{pushed or name}"')
    found = f'snapshot_download("{pushed}")'
    return "from huggingface_hub import snapshot_download\n" + usage.lines.replace("{here}", found)


def _front_matter(source: Source, usage: Usage, rows: list[Row], license: str | None) -> str:
    task = "unconditional-image-generation"
    if isinstance(source.module, TranslationModule) or not isinstance(source.module, ScoreModule):
        task = "image-to-image"
    metadata: dict[str, Any] = {"library_name": usage.library}
    if license is not None:
        metadata["license"] = license
    metadata |= {"pipeline_tag": task, "tags": ["lit_gen", "pytorch", _family(source)]}
    measured = [
        {"type": name.split("_")[0], "name": name, "value": float(f"{estimate.value:.6g}")}
        for name, estimate, n in rows
        if n is not None and math.isfinite(estimate.value)
    ]
    if measured:
        data = {"name": _data(source), "type": _data(source)}
        result = {"task": {"type": task}, "dataset": data, "metrics": measured}
        metadata["model-index"] = [{"name": source.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _family(source: Source) -> str:
    return "diffusion" if isinstance(source.module, ScoreModule) else "funit"


def _introduction(source: Source) -> str:
    module = source.module
    size = sum(p.numel() for p in module.ema_network().parameters()) if hasattr(module, "ema_network") else 0
    kind = type(module).__name__
    if isinstance(module, ScoreModule):
        denoiser = module.denoiser
        parts = (denoiser.net, denoiser.process, denoiser.precondition)
        kind = f"{kind} ({', '.join(type(part).__name__ for part in parts)})"
        c, h, w = module.image_shape
        what = "latents" if module.codec else "images"
        kind += f" of {h}x{w} {what} (height x width) of {c} channel{'s' * (c > 1)}"
        kind += f", with {module.num_classes} classes" if module.num_classes else ""
    counted = f" Its network has {size:,} parameters." if size else ""
    return f"A {kind}, made with lit_gen.{counted}"


def _data(source: Source) -> str:
    """What the training images are called, as far as the configuration tells."""
    data = portable(source.config.get("data") or {})
    train = data.get("train") if isinstance(data.get("train"), dict) else data
    named = (train or {}).get("path") or data.get("path") or (train or {}).get("root")
    target = str((train or {}).get("_target_") or data.get("_target_") or "not known")
    return str(named) if named else target.rpartition(".")[2]


def _training(source: Source) -> dict[str, str]:
    summary = {} if source.run is None else runs.summary(source.run)
    around = {} if source.run is None else runs.read_json(source.run / "environment.json")
    versions = around.get("versions", {})
    rows: dict[str, Any] = {
        "data": _data(source),
        "steps": f"{source.step:,}" if source.step is not None else "not known",
        "batch size": summary.get("batch_size"),
        "seed": source.config.get("seed"),
        "weights": "moving average" if source.averaged else "as trained, not averaged",
        "started from": (portable(summary.get("weights") or {})).get("path"),
        "training time (wall clock)": f"{summary['train_seconds']:,.0f} s"
        if "train_seconds" in summary
        else None,
        "devices": ", ".join(around.get("devices") or []) or None,
        "commit": around.get("commit"),
        "trained with": ", ".join(f"{name} {value}" for name, value in versions.items()) or None,
        "exported with": f"lit_gen {__version__}",
    }
    return {name: str(text) for name, text in rows.items() if text is not None}


def _results(source: Source) -> tuple[list[Row], str]:
    """What was measured of these very weights, by the newest `lit-gen evaluate`; else at the end of the
    training."""
    if source.run is None:
        return [], "Nothing is recorded of measurements."
    for file in runs.evaluations(source.run):
        record = runs.read_json(file)
        weights = "average" if source.ema else "raw"
        own = Path(str(record.get("checkpoint"))).name == source.path.name
        own &= file.stat().st_mtime >= source.path.stat().st_mtime  # not of weights that these replaced
        if own and record.get("weights", weights) == weights:
            against = record.get("reference", f"{record.get('target_classes')} classes of the test split")
            told = f"Measured after the training, seed {record['seed']}, against {portable(against)}"
            ways = {name: record.get(name) for name in ("sampler", "guidance")}
            told += "".join(f", {name} `{portable(way)}`" for name, way in ways.items() if way)
            return results_of(record), told + "."
    history = runs.history(source.run)
    chosen = {name: values for name, values in history.items() if _SAMPLES.search(name) and "/" not in name}
    if not chosen:
        return [], "Nothing is recorded of measurements."
    last = max(max(values) for values in chosen.values())
    rows = []
    for name, values in sorted(chosen.items()):
        if last in values:
            found, error = _SAMPLES.search(name), history.get(f"se/{name}", {}).get(last)
            rows.append((name, Estimate(values[last], error), int(found[1]) if found else None))
    told = f"Measured in the training, after {last:,} steps."
    if source.step is not None and source.step != last:
        told += f" These weights are those after {source.step:,} steps."
    return rows, told


def _table(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = ["| measure | value ± standard error | generated images |", "|---|---|---|"]
    lines += [f"| {name} | {with_error(estimate)} | {n or ''} |" for name, estimate, n in rows]
    return "\n".join(lines)


def _configuration(source: Source) -> str:
    shown = runs.yaml_text(portable({key: source.config.get(key) for key in ("model", "data")}))
    return f"<details><summary>Configuration</summary>\n\n```yaml\n{shown.strip()}\n```\n\n</details>"


def _picture(source: Source) -> Path | None:
    """The newest grid of samples or translations of the run."""
    found = [] if source.run is None else list(source.run.glob("grids/*.png"))
    for kind in ("grid", "samples", "translations", ""):
        if named := [path for path in found if path.stem.startswith(kind)]:
            return max(named, key=lambda path: path.stem.rpartition("_")[2])
    return None
