"""What a trained model, or any set of images, is worth: the table and the JSON record of `python -m
lit-gen evaluate`."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lit_gen import __version__, models
from lit_gen.data.images import batches
from lit_gen.errors import ConfigError
from lit_gen.evaluation.likelihood import measure_densities
from lit_gen.images import grid, save_png
from lit_gen.inputs import classes_of, open_images, open_reference
from lit_gen.instantiate import instantiate
from lit_gen.metrics import (
    Estimate,
    Evaluation,
    Extractor,
    Moments,
    Summary,
    as_json,
    check_measures,
    compare,
    frechet_distance,
    records,
    reference_summary,
)
from lit_gen.metrics.distributed import all_gather, from_rank_zero, own_batches, rank, world_size
from lit_gen.metrics.neighbours import nearest
from lit_gen.models import guide

__all__ = ["evaluate", "stored", "summarise", "with_error"]


def evaluate(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Measures the samples of `cfg.run`, or the images of `cfg.images`, against the reference; writes
    `out/evaluation.json`, `out/grid.png` and, where training images are known, `out/nearest.png`, prints the
    table and returns the record. Of several ranks each measures its share, and rank 0 writes.

    Raises ConfigError for what does not fit together, besides what `models.load` raises.
    """
    if (cfg.run is None) == (cfg.images is None):
        raise ConfigError(
            "Give run=<run folder or checkpoint>, or images=<folder, zip or npz> with "
            "reference=<folder, zip, npz or statistics file>."
        )
    check_measures(cfg.measures)
    if cfg.batch_size < 1 or cfg.k < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} and k={cfg.k} must be at least 1.")
    from_rank_zero(lambda: _claim(out))
    return _of_images(cfg, out) if cfg.run is None else _of_run(cfg, out)


def _claim(out: Path) -> None:
    if (out / "evaluation.json").exists():
        raise ConfigError(f"{out} already holds an evaluation: choose another out=.")


@dataclass
class _Sets:
    """The images that generated ones are held against: data sets or, of a reference, its moments alone."""

    extractor: Extractor
    reference: Any
    training: Any | None
    reference_name: str


def _of_images(cfg: DictConfig, out: Path) -> dict[str, Any]:
    if cfg.reference is None:
        raise ConfigError(f"images={cfg.images} need reference=<folder, zip, npz or statistics file>.")
    if cfg.sampler is not None or cfg.guidance is not None or cfg.bits_per_dim or cfg.bound:
        raise ConfigError(
            "sampler, guidance, bits_per_dim and bound are of a run=; images= are measured as they are."
        )
    extractor = _extractor(cfg.extractor or {"_target_": "lit_gen.metrics.inception2015"}, cfg)
    sets = _sets(cfg, extractor, None)
    generated = open_images(cfg.images, cfg.image_size, cfg.fit)
    n = len(generated) if cfg.num is None else cfg.num
    if not 2 <= n <= len(generated):
        raise ConfigError(f"num={n}: {cfg.images} has {len(generated)} images, and two are needed at least.")
    classes = classes_of(generated, sets.reference) if cfg.per_class else None

    def rows(indices: Sequence[int]) -> Tensor:
        return torch.stack([generated[int(i)]["image"] for i in indices])

    parts = batches(generated, own_batches(n, cfg.batch_size))
    summary = summarise(parts, n, extractor, cfg, classes, "generated images")
    record = {"images": str(cfg.images), "n_fake": n}
    return _measured(cfg, out, sets, summary, classes, rows, record)


def _of_run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    allow = list(cfg.allow_targets)
    module, run_cfg, path = models.load(cfg.run, cfg.checkpoint, ema=cfg.ema, allow=allow, device=cfg.device)
    guide(module, cfg)
    quality = run_cfg.callbacks.get("quality") or {}
    if not quality and cfg.extractor is None:
        raise ConfigError(
            f"{cfg.run} was trained without a measure: it has no callbacks.quality. Choose "
            "extractor=digits64, extractor=inception or another of conf/extractor."
        )
    extractor = _extractor(cfg.extractor or quality.extractor, cfg)
    classifier = instantiate(quality.classifier, allow) if quality.get("classifier") else None
    data = instantiate(run_cfg.data, allow)
    if world_size() > 1:
        from_rank_zero(data.prepare_data)  # so that a download happens once
    n = len(data.train) if cfg.num is None else cfg.num
    if n < 2:
        raise ConfigError(f"num={n}: a Frechet distance needs at least 2 samples.")
    sampler = instantiate(cfg.sampler, allow) if cfg.sampler else None
    sets = _sets(cfg, extractor, data)
    classes = classes_of(sets.reference, data.train) if cfg.per_class else None
    if classes and classes != module.num_classes:
        raise ConfigError(f"per_class=true: the model draws {module.num_classes} classes, not {classes}.")

    def rows(indices: Sequence[int]) -> Tensor:
        return module.sample([int(i) for i in indices], cfg.seed, sampler).cpu()

    judged = None if classifier is None else _Judged(classifier, module.num_classes)

    def parts() -> Any:
        for indices in own_batches(n, cfg.batch_size):
            images = rows(indices)
            if judged is not None:
                judged.update(indices, images)
            yield indices, images, torch.tensor([i % classes for i in indices]) if classes else None

    densities = measure_densities(module, data.test, cfg)
    start = time.perf_counter()
    summary = summarise(parts(), n, extractor, cfg, classes, "samples")
    seconds = time.perf_counter() - start
    record = {
        "checkpoint": str(path),
        "n_fake": n,
        "seed": cfg.seed,
        "sampler": str(cfg.sampler or run_cfg.sampler),
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "samples_per_second": n / seconds,
    }
    if judged is not None:
        record |= judged.shares(n)
    return _measured(cfg, out, sets, summary, classes, rows, record, densities)


class _Judged:
    """What a classifier finds in the samples: how many it is sure of, by class, and how many are of the class
    that was asked for."""

    def __init__(self, classifier: Extractor, num_classes: int):
        self.classifier, self.num_classes = classifier, num_classes
        self.sure = torch.zeros(1024, dtype=torch.int64)
        self.asked = torch.zeros((), dtype=torch.int64)

    def update(self, indices: Sequence[int], images: Tensor) -> None:
        p, found = (x.cpu() for x in self.classifier.with_logits(images)[1].softmax(1).max(1))
        self.sure += torch.bincount(found[p > 0.9], minlength=len(self.sure))
        if self.num_classes:
            self.asked += (found == torch.tensor(indices) % self.num_classes).sum()

    def shares(self, n: int) -> dict[str, Any]:
        """Of the n samples of all ranks; every rank must call."""
        sure, asked = all_gather(self.sure).sum(0), int(all_gather(self.asked).sum())
        found = {"confident_share": int(sure.sum()) / n, "classes_found": int((sure > 0).sum())}
        return found | ({"asked_share": asked / n} if self.num_classes else {})


def _extractor(node: Any, cfg: DictConfig) -> Extractor:
    return instantiate(node, list(cfg.allow_targets))


def _sets(cfg: DictConfig, extractor: Extractor, data: Any | None) -> _Sets:
    """What `cfg` names, or the splits of a run's data."""
    given = {"n": cfg.reference_n, "resize": cfg.reference_resize, "section": cfg.reference_section}
    if cfg.reference is not None:
        reference, name = (
            open_reference(cfg.reference, extractor, **given, image_size=cfg.image_size, fit=cfg.fit),
            str(cfg.reference),
        )
    else:
        reference, name = data.test, data.test.fingerprint()
    if cfg.training is not None:
        training = open_images(cfg.training, cfg.image_size, cfg.fit)
    else:
        training = None if data is None else data.train
    if isinstance(reference, Moments) and cfg.per_class:
        raise ConfigError(f"per_class=true needs images, {cfg.reference} holds statistics.")
    return _Sets(extractor, reference, training, name)


def summarise(
    parts: Any, n: int, extractor: Extractor, cfg: DictConfig, classes: int | None, what: str
) -> Summary:
    """One pass over `parts`, this rank's batches of n images: (numbers, uint8 images, labels or None).

    The summary is of all ranks' images; every rank must call.
    """
    evaluation = Evaluation(extractor, reservoir=cfg.reservoir, num_classes=classes)
    for rows, images, labels in _shown(parts, n, cfg, what):
        evaluation.update(images, torch.as_tensor(rows), labels)
    return evaluation.summary()


def _shown(parts: Any, n: int, cfg: DictConfig, what: str) -> Any:
    """`parts` with the images on the device, and a bar of rank 0's share, which is like the others'."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    total = len(own_batches(n, cfg.batch_size))
    hidden = total < 2 or rank() > 0
    for rows, images, labels in track(parts, what, total=total, console=Console(stderr=True), disable=hidden):
        yield rows, images.to(device), labels


def stored(dataset: Any, extractor: Extractor, cfg: DictConfig, classes: int | None, what: str) -> Summary:
    """The summary of a set of real images, from the cache where it is known. Every rank must call."""
    n = len(dataset)
    return reference_summary(
        lambda: _shown(batches(dataset, own_batches(n, cfg.batch_size)), n, cfg, what),
        extractor,
        data=dataset.fingerprint(),
        split="all",
        n=n,
        reservoir=cfg.reservoir,
        num_classes=classes,
    )


def _measured(
    cfg: DictConfig,
    out: Path,
    sets: _Sets,
    generated: Summary,
    classes: int | None,
    rows: Callable[[Sequence[int]], Tensor],
    record: dict[str, Any],
    extra: dict[str, Estimate] | None = None,
) -> dict[str, Any]:
    """The numbers and pictures of the generated images, whose `rows(indices)` are uint8 (N, C, H, W)."""
    extractor = sets.extractor
    reference = sets.reference
    if not isinstance(reference, Moments):
        reference = stored(reference, extractor, cfg, classes, "reference")
    training = None
    if sets.training is not None:
        training = stored(sets.training, extractor, cfg, None, "training images")
    results = compare(reference, generated, training=training, k=cfg.k, only=tuple(cfg.measures))
    key = extractor.id.key("fd", generated.n)
    moments = reference if isinstance(reference, Moments) else reference.moments
    record = {"key": key, "extractor": str(extractor.id), "reference": sets.reference_name} | record
    record |= {"n_real": moments.n}
    if key in results:
        record["fd"] = results[key].value
    if training is not None:
        record["fd_floor"] = frechet_distance(moments, training.moments)
    entries = records(
        results | (extra or {}),
        extractor,
        n_real=moments.n,
        n_fake=generated.n,
        reference=sets.reference_name,
        seed=record.get("seed"),
    )
    record["results"] = json.loads(as_json(entries))
    record["versions"] = {"lit_gen": __version__, "torch": torch.__version__}
    if rank() > 0:
        return record
    out.mkdir(parents=True, exist_ok=True)
    shown = rows(range(min(64, generated.n)))
    scale = max(1, 64 // shown.shape[-1])
    save_png(grid(shown, scale=scale), out / "grid.png")
    if training is not None:
        sheet = _nearest_training(sets.training, training, generated, rows)
        save_png(grid(sheet.flatten(0, 1), columns=sheet.shape[1], scale=scale), out / "nearest.png")
    (out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    _print(record, results | (extra or {}), out)
    return record


def _nearest_training(
    dataset: Any,
    training: Summary,
    generated: Summary,
    rows: Callable[[Sequence[int]], Tensor],
    num: int = 8,
    k: int = 5,
) -> Tensor:
    """uint8 (num, 1 + k, C, H, W): the generated images nearest to a training image, each followed by its k
    nearest training images. A model that remembers shows pairs of equal pictures here.
    """
    distance, index = nearest(training.features, generated.features, min(k, len(training.features)))
    closest = distance[:, 0].argsort(stable=True)[:num]
    left = rows(generated.index[closest].tolist())
    right = [torch.stack([dataset[int(i)]["image"] for i in training.index[index[row]]]) for row in closest]
    if right[0].shape[1:] != left.shape[1:]:  # other channels or size: shown as the generated images are
        right = [_like(images, left) for images in right]
    return torch.stack([torch.cat([a[None], b]) for a, b in zip(left, right, strict=True)])


def _like(images: Tensor, other: Tensor) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), other.shape[-2:], mode="area")
    if resized.shape[1] != other.shape[1]:
        resized = resized.mean(1, keepdim=True).expand(-1, other.shape[1], -1, -1)
    return resized.round().to(torch.uint8)


def with_error(estimate: Estimate) -> str:
    """The value and its standard error, to the digits that the error leaves."""
    value, se = estimate
    if not math.isfinite(value):
        return "none"
    if not se:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(se)))
    return f"{value:.{decimals}f} ± {se:.{decimals}f}"


def _print(record: dict[str, Any], results: dict[str, Estimate], out: Path) -> None:
    table = Table(title=record.get("checkpoint") or f"{record['images']} against {record['reference']}")
    table.add_column("")
    table.add_column("value ± standard error", justify="right")
    for name, estimate in results.items():
        table.add_row(name, with_error(estimate))
        if name == record["key"] and "fd_floor" in record:
            table.add_row("  floor (training images against the reference)", f"{record['fd_floor']:.4f}")
    if "confident_share" in record:
        table.add_row(
            "samples that the classifier is sure of (p > 0.9)", f"{100 * record['confident_share']:.1f} %"
        )
        table.add_row("classes found", str(record["classes_found"]))
    if "asked_share" in record:
        table.add_row("samples of the class that was asked for", f"{100 * record['asked_share']:.1f} %")
    if "samples_per_second" in record:
        table.add_row("samples/s", f"{record['samples_per_second']:.0f}")
    console = Console()
    console.print(table)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
