"""Measure any images against any others: `lit-gen evaluate-images images=<folder> reference=<folder>`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen.cli import entry_point
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.devices import divided
from lit_gen.errors import ConfigError
from lit_gen.evaluation.samples import (
    Measurement,
    check_options,
    measure_images,
    options_of_images,
    reference_sets,
    report,
)
from lit_gen.inputs import classes_of, open_images
from lit_gen.instantiate import instantiate
from lit_gen.metrics.distributed import from_rank_zero


def evaluate_images(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Measures the first `cfg.num` of `cfg.images` against `cfg.reference`; writes what
    `lit_gen.evaluation.samples.report` says and returns the record. Of several ranks each measures its share,
    and rank 0 writes.

    Raises ConfigError for sets that cannot be read or compared.
    """
    images, _ = cfg.images, cfg.reference  # both must be given
    from_rank_zero(lambda: check_options(cfg, out))
    extractor = instantiate(cfg.extractor)
    against = reference_sets(cfg, extractor)
    generated = open_images(images, **options_of_images(cfg))
    extractor = extractor.reading(pixels_of(generated), shape_of(generated)[0])
    n = len(generated) if cfg.num is None else cfg.num
    if not 2 <= n <= len(generated):
        raise ConfigError(f"num={n}: {images} has {len(generated)} images, and at least two are needed.")
    classes = classes_of(generated, against.reference) if cfg.per_class else None
    measurement = Measurement.of(cfg, extractor)

    def images_at(indices: Sequence[int]) -> Tensor:
        return torch.stack([generated[int(i)]["image"] for i in indices])

    record = {"images": str(images), "n_fake": n}
    measured = measure_images(measurement, generated, against, n, classes)
    return report(out, measured, measurement, against, images_at, record)


main = entry_point("evaluate_images")(lambda cfg: divided(evaluate_images, cfg))

if __name__ == "__main__":
    main()
