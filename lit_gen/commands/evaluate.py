"""Measure the samples of a trained run: `lit-gen evaluate run=<run folder> [num=...] [sampler=...]`."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen import models
from lit_gen.cli import entry_point
from lit_gen.devices import divided
from lit_gen.errors import ConfigError
from lit_gen.evaluation.likelihood import measure_likelihoods
from lit_gen.evaluation.samples import (
    Measurement,
    check_options,
    extractor_of,
    measure,
    reference_sets,
    report,
)
from lit_gen.inputs import classes_of
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Extractor
from lit_gen.metrics.distributed import all_gather, from_rank_zero, own_batches, world_size

__all__ = ["evaluate"]


def evaluate(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Measures samples of `cfg.run` against its test images or `cfg.reference`, and the likelihoods of test
    images that `cfg` asks for; writes what `lit_gen.evaluation.samples.report` says and returns the record.
    Of several ranks each measures its share, and rank 0 writes.

    Raises ConfigError for options that do not fit the run, besides what `models.load` raises.
    """
    from_rank_zero(lambda: check_options(cfg, out))
    module, run_cfg, path = models.load(cfg.run, cfg.checkpoint, ema=cfg.ema, device=cfg.device)
    if not hasattr(module, "sample"):
        raise ConfigError(
            f"{cfg.run} is a run of {type(module).__name__}, which draws no samples from noise"
            + (": measure it by lit-gen evaluate-translation." if hasattr(module, "translate") else ".")
        )
    models.guide(module, cfg)
    extractor, classifier = _networks(cfg, run_cfg)
    data = instantiate(run_cfg.data)
    if world_size() > 1:
        from_rank_zero(data.prepare_data)  # so that a download happens once
    n = len(data.train) if cfg.num is None else cfg.num
    if n < 2:
        raise ConfigError(f"num={n}: a Frechet distance needs at least 2 samples.")
    sampler = instantiate(cfg.sampler) if cfg.sampler else None
    against = reference_sets(cfg, extractor, data)
    classes = classes_of(against.reference, data.train) if cfg.per_class else None
    if classes and classes != module.num_classes:
        raise ConfigError(f"per_class=true: the model draws {module.num_classes} classes, not {classes}.")

    def images_at(indices: Sequence[int]) -> Tensor:
        return module.sample([int(i) for i in indices], cfg.seed, sampler).cpu()

    predictions = None if classifier is None else _Predictions(classifier, module.num_classes)

    def parts() -> Iterator[tuple[range, Tensor, Tensor | None]]:
        for indices in own_batches(n, cfg.batch_size):
            images = images_at(indices)
            if predictions is not None:
                predictions.update(indices, images)
            yield indices, images, torch.tensor([i % classes for i in indices]) if classes else None

    likelihoods = measure_likelihoods(module, data.test, cfg)
    measurement = Measurement.of(cfg, extractor)
    start = time.perf_counter()
    generated = measurement.summarize(parts(), n, "samples", classes)
    seconds = time.perf_counter() - start
    record = {
        "checkpoint": str(path),
        "n_fake": n,
        "seed": cfg.seed,
        "sampler": str(cfg.sampler or run_cfg.sampler),
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "samples_per_second": n / seconds,
    }
    if predictions is not None:
        record |= predictions.fractions(n)
    measured = measure(measurement, against, generated, classes)
    return report(out, measured, measurement, against, images_at, record, likelihoods)


def _networks(cfg: DictConfig, run_cfg: DictConfig) -> tuple[Extractor, Extractor | None]:
    """The extractor, `cfg.extractor` or the one that the run was measured by, and the run's classifier, if
    it has one."""
    classifier = run_cfg.metrics.classifier
    return extractor_of(cfg, run_cfg, cfg.run), instantiate(classifier) if classifier else None


class _Predictions:
    """The classes that a classifier predicts for the samples: how many are predicted with p > 0.9, by class,
    and how many are of the class that the sample was conditioned on."""

    def __init__(self, classifier: Extractor, num_classes: int):
        self.classifier, self.num_classes = classifier, num_classes
        self.confident = torch.zeros(1024, dtype=torch.int64)
        self.right = torch.zeros((), dtype=torch.int64)

    def update(self, indices: Sequence[int], images: Tensor) -> None:
        logits = self.classifier.with_logits(images)[1]
        assert logits is not None  # a classifier has them
        p, predicted = (x.cpu() for x in logits.softmax(1).max(1))
        self.confident += torch.bincount(predicted[p > 0.9], minlength=len(self.confident))
        if self.num_classes:
            self.right += (predicted == torch.tensor(indices) % self.num_classes).sum()

    def fractions(self, n: int) -> dict[str, Any]:
        """Of the n samples of all ranks; every rank must call."""
        confident, right = all_gather(self.confident).sum(0), int(all_gather(self.right).sum())
        found = {
            "confident_fraction": int(confident.sum()) / n,
            "classes_found": int((confident > 0).sum()),
        }
        return found | ({"class_accuracy": right / n} if self.num_classes else {})


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """The command line's."""
    divided(evaluate, cfg)


if __name__ == "__main__":
    main()
