"""The Frechet distance of samples to the test images while a model trains."""

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_gen.callbacks.ema import evaluating
from lit_gen.data.images import batches
from lit_gen.errors import ConfigError
from lit_gen.metrics import (
    Evaluation,
    Extractor,
    Moments,
    Summary,
    check_measures,
    compare,
    frechet_distance,
    reference_moments,
    reference_summary,
)
from lit_gen.metrics.distributed import own_batches

__all__ = ["SampleQuality"]


class SampleQuality(pl.Callback):
    """Every `every` batches the Frechet distance of `num_images` samples (EMA weights, seeds fixed) to the
    test split; at the end that of `final_images` (None: as many as the training split has) beside its floor,
    the distance of the training split itself to the test split.

    Logged under the extractor's full name (`ExtractorId.key`), because distances by different networks do not
    compare, and kept as `module.scores["fd"]` for the choice of the best checkpoint. Image i is sampled by
    rank i mod W and depends on its seed alone, so the distance does not depend on the number of devices.

    `measures` adds others of `lit_gen.metrics.MEASURES` to the Frechet distance, `fd`, all from one pass over
    the samples. Beside each stands its standard error as `se/<name>`, where it has one. `reservoir` images at
    most are kept as features for those that need them.

    `classifier`, an extractor with logits trained on the same classes, adds the share of the final samples
    whose class it is sure of (p > 0.9) and the number of classes found.
    """

    asks = ("sample",)

    def __init__(
        self,
        extractor: Extractor,
        every: int = 1000,
        num_images: int = 1000,
        final_images: int | None = None,
        seed: int = 1,
        classifier: Extractor | None = None,
        batch_size: int = 256,
        measures: Sequence[str] = ("fd",),
        reservoir: int = 10_000,
    ):
        check_measures(measures)
        if "fd" not in measures:
            raise ConfigError(f"callbacks.quality.measures={list(measures)}: fd must be among them.")
        if "fdclass" in measures:
            raise ConfigError("fdclass is measured after the training: lit_gen.evaluate per_class=true.")
        if every < 1 or num_images < 2:
            raise ConfigError(
                f"callbacks.quality: every={every} must be at least 1 and num_images={num_images} at least 2."
            )
        self.extractor, self.classifier = extractor, classifier
        self.every, self.num_images, self.final_images = every, num_images, final_images
        self.seed, self.batch_size = seed, batch_size
        self.measures, self.reservoir = tuple(measures), reservoir
        self._reference: Moments | Summary | None = None
        self._training: Summary | None = None
        self._drawn, self._seconds = 0, 0.0  # samples of all evaluations, and the time they took
        # step, samples so far, their sums, the classes of those that the classifier is sure of
        self._open: tuple[int, int, Evaluation, list[Tensor]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        known_by_moments = {"fd", "fdinf", "is", "authpct"}.issuperset(self.measures)
        self._reference = (self.moments_of if known_by_moments else self.summary_of)(data, "test")
        self._training = self.summary_of(data, "train") if "authpct" in self.measures else None

    def moments_of(self, data: Any, split: str) -> Moments:
        """Moments of a split's features, from the cache where they are known. Every rank must call it."""
        dataset = data.dataset(split)
        return reference_moments(
            lambda: batches(dataset, own_batches(len(dataset), self.batch_size)),
            self.extractor,
            data=dataset.fingerprint(),
            split=split,
            n=len(dataset),
        )

    def summary_of(self, data: Any, split: str) -> Summary:
        """As `moments_of`, with a random part of the features."""
        dataset = data.dataset(split)
        return reference_summary(
            lambda: batches(dataset, own_batches(len(dataset), self.batch_size)),
            self.extractor,
            data=dataset.fingerprint(),
            split=split,
            n=len(dataset),
            reservoir=self.reservoir,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen % self.every == 0:
            self.measure(trainer, pl_module, self.num_images)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        n = self.final_images or len(trainer.datamodule.train)
        value = self.measure(trainer, pl_module, n)
        reference = self._reference if isinstance(self._reference, Moments) else self._reference.moments
        floor = frechet_distance(reference, self.moments_of(trainer.datamodule, "train"))
        pl_module.summary |= {
            "fd": value,
            "fd_floor": floor,
            "fd_name": self.extractor.id.key("fd", n),
            "samples": n,
            "samples_per_second": round(self._drawn / self._seconds, 1),
        }
        if self.classifier is not None:
            confident, classes = self._judged
            pl_module.summary |= {"confident_share": confident, "classes_found": classes}

    def measure(self, trainer: pl.Trainer, pl_module: Any, n: int) -> float:
        """The distance of n samples, on every rank the same. Samples measured at this step before are not
        drawn again."""
        step = pl_module.batches_seen
        if self._open is None or self._open[0] != step or self._open[1] > n:
            self._open = (step, 0, Evaluation(self.extractor, reservoir=self.reservoir), [])
        _, done, evaluation, classes = self._open
        begun = time.perf_counter()
        mine = [i for i in range(done, n) if i % trainer.world_size == trainer.global_rank]
        with evaluating(trainer):
            for start in range(0, len(mine), self.batch_size):
                indices = mine[start : start + self.batch_size]
                images = pl_module.sample(indices, self.seed)
                evaluation.update(images, torch.tensor(indices))
                if self.classifier is not None:
                    p, found = self.classifier.with_logits(images)[1].softmax(1).max(1)
                    classes.append(found[p > 0.9])
        self._open = (step, n, evaluation, classes)
        self._drawn, self._seconds = self._drawn + n - done, self._seconds + time.perf_counter() - begun
        results = compare(self._reference, evaluation.summary(), training=self._training, only=self.measures)
        value = results[self.extractor.id.key("fd", n)].value
        scores = {name: estimate.value for name, estimate in results.items()}
        scores |= {f"se/{name}": estimate.se for name, estimate in results.items() if estimate.se is not None}
        if self.classifier is not None:
            self._judged = self._judge(trainer, torch.cat(classes), n)
            scores["samples/confident_share"] = self._judged[0]
        pl_module.write(scores, step)
        pl_module.scores["fd"] = (step, value)
        return value

    def _judge(self, trainer: pl.Trainer, classes: Tensor, n: int) -> tuple[float, int]:
        """The share of the n samples that are sure (of `classes`), and how many classes those have, over all
        ranks."""
        sure = torch.bincount(classes, minlength=1024).float()
        if trainer.world_size > 1:
            sure = trainer.strategy.reduce(sure, reduce_op="sum")
        return float(sure.sum() / n), int((sure > 0).sum())
