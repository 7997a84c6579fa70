"""Sets of images measured against reference images: what `lit-gen evaluate`, `evaluate-images` and `compare`
share."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lit_gen import __version__, models
from lit_gen.callbacks.contracts import Samples, Translates
from lit_gen.cli import check_at_least_1, claim, show, table
from lit_gen.data.images import batches, pixels_of, shape_of
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png
from lit_gen.inputs import open_images, open_reference, run_data
from lit_gen.instantiate import instantiate
from lit_gen.metrics import (
    Estimate,
    Evaluation,
    Extractor,
    Moments,
    Summary,
    check_metrics,
    compare,
    frechet_distance,
    records,
    reference_summary,
)
from lit_gen.metrics.distributed import own_batches, rank
from lit_gen.metrics.neighbours import nearest
from lit_gen.runs import write_json

Batches = Iterable[tuple[range, Tensor, Tensor | None]]
"""Numbers of images, the images, (B, C, H, W), and their labels, int64 (B,), if they have any."""

ImagesAt = Callable[[Sequence[int]], Tensor]
"""Numbers of generated images -> these images, (N, C, H, W)."""


def check_options(
    cfg: DictConfig, out: Path, what: str = "an evaluation", file: str = "evaluation.json"
) -> None:
    """Raises ConfigError for metrics that there are not, sizes below one, and an `out` that holds results."""
    check_metrics(cfg.measures)
    check_at_least_1(cfg, "batch_size", "k")
    if (out / file).exists():  # said before the work is done; the folder is made after it
        raise ConfigError(f"{out} already holds {what}: choose another out=.")


def open_run(cfg: DictConfig, run: str | Path) -> tuple[Any, DictConfig, Path]:
    """(module, configuration, file) of a run whose model draws samples; ConfigError for another one."""
    module, config, file = models.load(run, cfg.checkpoint, ema=cfg.ema, device=cfg.device)
    if not isinstance(module, Samples):
        raise ConfigError(
            f"{run} is a run of {type(module).__name__}, which draws no samples from noise"
            + (": measure it by lit-gen evaluate-translation." if isinstance(module, Translates) else ".")
        )
    return module, config, file


def data_and_num(cfg: DictConfig, run_cfg: DictConfig, split: str = "train") -> tuple[Any, int]:
    """The run's data, and how many samples are drawn: `cfg.num`, or as many as the split has images."""
    data = run_data(run_cfg)
    n = len(data.dataset(split)) if cfg.num is None else cfg.num
    if n < 2:
        raise ConfigError(f"num={n}: a Frechet distance needs at least 2 samples.")
    return data, n


def extractor_of(cfg: DictConfig, run_cfg: DictConfig, run: str) -> Extractor:
    """`cfg.extractor`, or the one that the run was measured by. Raises ConfigError for a run without one."""
    node = cfg.extractor or run_cfg.metrics.extractor
    if node is None:
        raise ConfigError(
            f"{run} was trained without an extractor (metrics.extractor). Choose extractor=digits64, "
            "extractor=inception or another of conf/extractor."
        )
    return instantiate(node)


@dataclass(frozen=True)
class Measurement:
    """How sets of images are measured: the features of `extractor`, on `device` (None: a GPU if there is
    one), `batch_size` images at a time.

    `metrics` are those of `lit_gen.metrics.METRICS`, none of them meaning all that are possible; `k` is the
    number of neighbors of precision, recall, density, and coverage. Features of at most `max_stored_features`
    images are kept for metrics that need more than moments.
    """

    extractor: Extractor
    metrics: tuple[str, ...] = ()
    k: int = 5
    max_stored_features: int = 10_000
    batch_size: int = 256
    device: str | None = None

    @classmethod
    def of(cls, cfg: DictConfig, extractor: Extractor) -> "Measurement":
        """By the options of a command."""
        return cls(extractor, tuple(cfg.measures), cfg.k, cfg.max_stored_features, cfg.batch_size, cfg.device)

    def summarize(self, parts: Batches, n: int, what: str, num_classes: int | None = None) -> Summary:
        """One pass over `parts`, this rank's batches of n images, with `what` beside the progress bar; of
        several ranks the summary is of all images, and every rank must call."""
        evaluation = self._evaluation(num_classes)
        for rows, images, labels in self._shown(parts, n, what):
            evaluation.update(images, torch.as_tensor(rows), labels)
        return evaluation.summary()

    def summarize_dataset(self, dataset: Any, what: str, num_classes: int | None = None) -> Summary:
        """The summary of a set of real images, from the cache where it is known. Every rank must call."""
        n = len(dataset)
        parts = batches(dataset, own_batches(n, self.batch_size))
        return reference_summary(
            lambda: self._shown(parts, n, what),
            self._evaluation(num_classes, dataset),
            data=dataset.fingerprint(),
            n=n,
        )

    def _evaluation(self, num_classes: int | None, dataset: Any = None) -> Evaluation:
        stored, extractor = self.max_stored_features, self.extractor
        if dataset is not None:
            extractor = extractor.reading(pixels_of(dataset), shape_of(dataset)[0])
        return Evaluation(extractor, max_stored_features=stored, num_classes=num_classes)

    def compare(
        self, reference: Summary | Moments, generated: Summary, training: Summary | None = None
    ) -> dict[str, Estimate]:
        """The metrics of generated images against the reference, by name."""
        return compare(reference, generated, training=training, k=self.k, only=self.metrics)

    def _shown(self, parts: Batches, n: int, what: str) -> Iterator[tuple[range, Tensor, Tensor | None]]:
        """`parts` with the images on the device, and a bar of rank 0's share, which is like the others'."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        total = len(own_batches(n, self.batch_size))
        hidden = total < 2 or rank() > 0
        console = Console(stderr=True)
        for rows, images, labels in track(parts, what, total=total, console=console, disable=hidden):
            yield rows, images.to(device), labels


@dataclass(frozen=True)
class References:
    """What generated images are measured against: a data set or its moments alone; and the training images,
    where they are known."""

    reference: Any
    name: str
    training: Any | None = None


def options_of_images(cfg: DictConfig, data: Any | None = None) -> dict[str, Any]:
    """How image sets are opened that the options of a command name (`lit_gen.inputs.open_images`): what they
    do not say is as in the run's data, where those are not pictures."""
    test = None if data is None else data.test
    pixels, channels = pixels_of(test), 3 if test is None else shape_of(test)[0]
    if pixels.are_bytes and channels in (1, 3):
        channels = 3
    return {
        "image_size": cfg.image_size,
        "fit": cfg.fit,
        "channels": cfg.channels or channels,
        "dtype": cfg.dtype or pixels.dtype,
        "range": cfg.range or (pixels.range if cfg.dtype in (None, pixels.dtype) else None),
    }


def reference_sets(cfg: DictConfig, extractor: Extractor, data: Any | None = None) -> References:
    """What `cfg.reference` and `cfg.training` name, else the splits of a run's data."""
    if cfg.reference is not None:
        name = str(cfg.reference)
        reference = open_reference(
            cfg.reference,
            extractor,
            n=cfg.reference_n,
            resize=cfg.reference_resize,
            section=cfg.reference_section,
            **options_of_images(cfg, data),
        )
    else:
        assert data is not None  # of a run, whose test images are the reference
        reference, name = data.test, data.test.fingerprint()
    if cfg.training is not None:
        training = open_images(cfg.training, **options_of_images(cfg, data))
    else:
        training = None if data is None else data.train
    if isinstance(reference, Moments) and cfg.per_class:
        raise ConfigError(f"per_class=true needs images, {cfg.reference} holds statistics.")
    return References(reference, name, training)


@dataclass(frozen=True)
class Measured:
    """The metrics of generated images by name, and what they were computed from."""

    results: dict[str, Estimate]
    moments: Moments
    generated: Summary
    training: Summary | None


def measure(
    measurement: Measurement, against: References, generated: Summary, num_classes: int | None = None
) -> Measured:
    """Every rank must call."""
    reference = against.reference
    if not isinstance(reference, Moments):
        reference = measurement.summarize_dataset(reference, "reference", num_classes)
    training = None
    if against.training is not None:
        training = measurement.summarize_dataset(against.training, "training images")
    results = measurement.compare(reference, generated, training)
    moments = reference if isinstance(reference, Moments) else reference.moments
    return Measured(results, moments, generated, training)


def measure_images(
    measurement: Measurement, images: Any, against: References, n: int, num_classes: int | None = None
) -> Measured:
    """The first n of a set of images. Every rank must call."""
    parts = batches(images, own_batches(n, measurement.batch_size))
    summary = measurement.summarize(parts, n, "generated images", num_classes)
    return measure(measurement, against, summary, num_classes)


def report(
    out: Path,
    measured: Measured,
    measurement: Measurement,
    against: References,
    images_at: ImagesAt,
    record: dict[str, Any],
    likelihoods: dict[str, Estimate] | None = None,
) -> dict[str, Any]:
    """Writes `out/evaluation.json`, `out/grid.png` and, where training images are known, `out/nearest.png`;
    prints the table and returns the record, `record` among it. Rank 0 writes."""
    extractor, generated, training = measurement.extractor, measured.generated, measured.training
    key = extractor.id.key("fd", generated.n)
    record = {"key": key, "extractor": str(extractor.id), "reference": against.name} | record
    record |= {"n_real": measured.moments.n}
    if key in measured.results:
        record["fd"] = measured.results[key].value
    if training is not None:
        record["fd_train_test"] = frechet_distance(measured.moments, training.moments)
    results = measured.results | (likelihoods or {})
    record["results"] = records(
        results,
        extractor,
        n_real=measured.moments.n,
        n_fake=generated.n,
        reference=against.name,
        seed=record.get("seed"),
    )
    record["versions"] = {"lit_gen": __version__, "torch": torch.__version__}
    if rank() > 0:
        return record
    claim(out, "an evaluation", "evaluation.json")

    def shown(indices: Sequence[int]) -> Tensor:
        return extractor.pixels.picture(images_at(indices))

    save_png(grid(shown(range(min(64, generated.n))), scale=0), out / "grid.png")
    if training is not None:
        sheet = _nearest_training(against.training, training, generated, shown)
        save_png(grid(sheet.flatten(0, 1), columns=sheet.shape[1], scale=0), out / "nearest.png")
    write_json(out / "evaluation.json", record)
    _print(record, results, out)
    return record


def _nearest_training(
    dataset: Any,
    training: Summary,
    generated: Summary,
    images_at: ImagesAt,
    num: int = 8,
    k: int = 5,
) -> Tensor:
    """uint8 (num, 1 + k, 1 or 3, H, W): the generated images nearest to a training image, each followed by
    its k nearest training images. A model that remembers shows pairs of equal pictures here.
    """
    distance, index = nearest(training.features, generated.features, min(k, len(training.features)))
    closest = distance[:, 0].argsort(stable=True)[:num]
    left = images_at(generated.index[closest].tolist())
    show = pixels_of(dataset).picture
    right = [
        torch.stack([show(dataset[int(i)]["image"]) for i in training.index[index[row]]]) for row in closest
    ]
    if right[0].shape[1:] != left.shape[1:]:  # other channels or size: shown as the generated images are
        right = [_like(images, left) for images in right]
    return torch.stack([torch.cat([a[None], b]) for a, b in zip(left, right, strict=True)])


def _like(images: Tensor, other: Tensor) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), other.shape[-2:], mode="area")
    if resized.shape[1] != other.shape[1]:
        resized = resized.mean(1, keepdim=True).expand(-1, other.shape[1], -1, -1)
    return resized.round().to(torch.uint8)


def results_of(record: Mapping[str, Any]) -> list[tuple[str, Estimate, int | None]]:
    """(name, value, number of generated images) of all numbers in an `evaluation.json`, also in one of
    translations, which has a row for each number of class images and for baselines that generate nothing."""
    found = record.get("results", ())
    if isinstance(found, Mapping):
        n = record["contents"] * record["target_classes"]
        return [
            (f"{name}, {row}", Estimate(value, 0.0), n if row.startswith("K = ") else None)
            for row, numbers in found.items()
            for name, value in numbers.items()
        ]
    return [
        (e["key"], Estimate(math.nan if e["value"] is None else e["value"], e["se"]), e["n_fake"])
        for e in found
    ]


def with_error(estimate: Estimate) -> str:
    """The value and its standard error, to the digits that the error leaves."""
    value, se = estimate
    if not math.isfinite(value):
        return "none"
    if not se or se < 1e-9 * max(1.0, abs(value)):  # none, or rounding alone
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(se)))
    return f"{value:.{decimals}f} ± {se:.{decimals}f}"


def _print(record: dict[str, Any], results: dict[str, Estimate], out: Path) -> None:
    rows = []
    for name, estimate in results.items():
        told = " (papers report this)" if name.startswith("fdtrain_") else ""
        rows.append((name + told, with_error(estimate)))
        if name == record["key"] and "fd_train_test" in record:
            rows.append(("  train-test FD (training against reference)", f"{record['fd_train_test']:.4f}"))
    if "confident_fraction" in record:
        share = f"{100 * record['confident_fraction']:.1f} %"
        rows.append(("confident fraction (p > 0.9) of the samples", share))
        rows.append(("classes found", str(record["classes_found"])))
    if "class_accuracy" in record:
        rows.append(("class accuracy of the samples", f"{100 * record['class_accuracy']:.1f} %"))
    if "samples_per_second" in record:
        rows.append(("samples/s", f"{record['samples_per_second']:.0f}"))
    title = record.get("checkpoint") or f"{record['images']} against {record['reference']}"
    show(table(title, ["", "value ± standard error"], rows), f"written to {out}")
