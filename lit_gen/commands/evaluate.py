"""Measure the samples of a trained run: `lit-gen evaluate run=<run folder> [num=...] [sampler=...]`."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from lit_gen import models
from lit_gen.autoencoder.module import AutoencoderModule
from lit_gen.cli import entry_point
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.devices import divided
from lit_gen.errors import ConfigError
from lit_gen.evaluation.likelihood import measure_likelihoods
from lit_gen.evaluation.samples import (
    Measurement,
    check_options,
    data_and_num,
    extractor_of,
    measure,
    open_run,
    reference_sets,
    report,
)
from lit_gen.inputs import classes_of
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Predictions
from lit_gen.metrics.distributed import from_rank_zero, own_batches
from lit_gen.score.module import ScoreModule


def evaluate(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Measures samples of `cfg.run` against its test images or `cfg.reference`, and the likelihoods of test
    images that `cfg` asks for; writes what `lit_gen.evaluation.samples.report` says and returns the record.
    Of several ranks each measures its share, and rank 0 writes.

    Raises ConfigError for options that do not fit the run, besides what `models.load` raises.
    """
    from_rank_zero(lambda: check_options(cfg, out))
    module, run_cfg, path = open_run(cfg, cfg.run)
    models.guide(module, cfg)
    extractor = extractor_of(cfg, run_cfg, cfg.run)
    reconstructs = isinstance(module, AutoencoderModule)  # each test image once
    data, n = data_and_num(cfg, run_cfg, "test" if reconstructs else "train")
    pixels, channels = pixels_of(data.test), shape_of(data.test)[0]
    extractor = extractor.reading(pixels, channels)
    sampler = instantiate(cfg.sampler) if cfg.sampler else None
    against = reference_sets(cfg, extractor, data)
    classes = classes_of(against.reference, data.train) if cfg.per_class else None
    drawn = module.num_classes if isinstance(module, ScoreModule) else 0
    if classes and classes != drawn:
        raise ConfigError(f"per_class=true: the model draws {drawn or 'no'} classes, not {classes}.")

    if isinstance(module, AutoencoderModule):
        module.check(sampler)
        module.image_source = data  # which are open already
    elif isinstance(module, ScoreModule) and module.condition_source is not None:
        module.condition_source = data

    def images_at(indices: Sequence[int]) -> Tensor:
        return module.sample([int(i) for i in indices], cfg.seed, sampler).cpu()

    predictions, classifier = None, run_cfg.metrics.classifier
    if classifier:
        network = instantiate(classifier).reading(pixels, channels)
        labeled = isinstance(module, ScoreModule) and module.num_classes > 0
        predictions = Predictions(network, labeled=labeled)

    def parts() -> Iterator[tuple[range, Tensor, Tensor | None]]:
        for indices in own_batches(n, cfg.batch_size):
            if isinstance(module, ScoreModule):
                condition = module.condition_at(indices)
                images = module.sample(indices, cfg.seed, sampler, condition=condition).cpu()
                label = condition.label
            else:
                images, label = images_at(indices), None
            if predictions is not None:
                predictions.update(images, label)
            yield indices, images, label if classes else None

    likelihoods = measure_likelihoods(module, data.test, cfg)
    measurement = Measurement.of(cfg, extractor)
    start = time.perf_counter()
    generated = measurement.summarize(parts(), n, "samples", classes)
    seconds = time.perf_counter() - start
    record = {
        "checkpoint": str(path),
        "weights": "average" if cfg.ema else "raw",
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


main = entry_point("evaluate")(lambda cfg: divided(evaluate, cfg))

if __name__ == "__main__":
    main()
