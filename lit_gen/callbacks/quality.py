"""The Frechet distance of samples to the test images while a model trains."""

import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.callbacks.contracts import ImageData, Periodic, Sampler, Samples, data_of, of
from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.progress import working
from lit_gen.data.images import pixels_of, shape_of
from lit_gen.errors import ConfigError
from lit_gen.metrics import (
    NEED_TRAINING,
    Estimate,
    Evaluation,
    Extractor,
    Predictions,
    Summary,
    check_metrics,
    check_possible,
    compare,
    frechet_distance,
    reference_summary,
)
from lit_gen.metrics.distributed import own_batches
from lit_gen.module import BaseModule, callbacks_of

__all__ = ["SampleQuality"]


@dataclass
class _Drawn:
    """The first n samples of one step and one sampler."""

    step: int
    sampler: Sampler | None
    evaluation: Evaluation
    predictions: Predictions | None
    n: int = 0


class SampleQuality(Periodic):
    """Every `every` batches the Frechet distance of `num_images` samples (EMA weights, seeds fixed) to the
    test split; at the end that of `final_images` (None: as many as the training split has), beside their
    distance to the training split, which papers report, and the train-test FD, the distance of the training
    split itself to the test split.

    Logged under the extractor's full name (`ExtractorId.key`), because distances by different networks do not
    compare, and kept as the score `fd`, which chooses the best checkpoint. Image i is sampled by
    rank i mod W and depends on its seed alone, so the distance does not depend on the number of devices.

    `sampler` is the one of the distances while training, None the module's own. A recipe whose own takes a
    thousand evaluations an image is followed by one of a few dozen; its numbers have its name
    (`fid5k_heun18steps`), and they alone choose the best checkpoint. The last measurement is by the module's
    own sampler, as is `lit-gen evaluate` of the best checkpoint.

    `prefix` stands before the names of the numbers: r where the samples are reconstructions of test images.

    `measures` adds others of `lit_gen.metrics.METRICS` to the Frechet distance, `fd`, all from one pass over
    the samples. Beside each stands its standard error as `se/<name>`, where it has one. Features of at most
    `max_stored_features` images are kept for those that need them.

    `classifier`, an extractor with logits trained on the same classes, adds the confident fraction, the
    fraction of samples with p > 0.9, and the number of classes found among those.
    """

    requires = Samples

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
        max_stored_features: int = 10_000,
        sampler: Sampler | None = None,
        prefix: str = "",
    ):
        check_metrics(measures)
        if "fd" not in measures:
            raise ConfigError(f"callbacks.quality.measures={list(measures)}: fd must be among them.")
        if "fdclass" in measures:
            raise ConfigError("fdclass is measured after the training: lit-gen evaluate per_class=true.")
        super().__init__(every, "callbacks.quality")
        if num_images < 2:
            raise ConfigError(f"callbacks.quality.num_images={num_images}: must be at least 2.")
        self.extractor, self.classifier, self.sampler = extractor, classifier, sampler
        self.num_images, self.final_images, self.prefix = num_images, final_images, prefix
        self.seed, self.batch_size = seed, batch_size
        self.measures, self.max_stored_features = tuple(measures), max_stored_features
        self._reference: Summary | None = None
        self._training: Summary | None = None
        self._drawn: _Drawn | None = None
        self._pace: dict[Sampler | None, tuple[int, float]] = {}  # samples so far, and the time they took
        self._running_name = ""  # of the distances while training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.sampler is not None:
            of(pl_module, Samples).check(self.sampler)
        test = data_of(trainer, ImageData).dataset("test")
        pixels, channels = pixels_of(test), shape_of(test)[0]
        self.extractor = self.extractor.reading(pixels, channels)
        self.classifier = self.classifier and self.classifier.reading(pixels, channels)
        self._reference = self.summary_of(trainer, "test")
        if NEED_TRAINING & set(self.measures):
            self._training = self.summary_of(trainer, "train")
        for n in (self.num_images, self._final_images(trainer)):
            kept = min(n, self.max_stored_features)
            check_possible(self.measures, self._reference, kept, training=self._training)

    def state_dict(self) -> dict[str, Any]:
        return {"running_name": self._running_name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._running_name = state_dict["running_name"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self._running_name
        own = self.extractor.id.key("fd", self.num_images)
        self._running_name = self.prefix + own + self._suffix(of(pl_module, Samples), self.sampler)
        if before and before != self._running_name:
            rank_zero_warn(
                f"The best checkpoint is chosen anew: the run measured {before} until now, which does not "
                f"compare with {self._running_name}."
            )
            for callback in callbacks_of(trainer, Checkpoint):
                if callback.monitor == "fd":
                    callback.best = callback.best_step = None

    def summary_of(self, trainer: Trainer, split: str) -> Summary:
        """Of a split's features, from the cache where they are known. Every rank must call it; in `setup` the
        module is not on the device yet."""
        data, device = data_of(trainer, ImageData), trainer.strategy.root_device
        dataset = data.dataset(split)
        parts = own_batches(len(dataset), self.batch_size)

        def images() -> Iterator[tuple[range, Tensor, Tensor]]:
            what = f"{self.extractor.id.name} features of the {split} images, computed once"
            with working(trainer, what, sum(map(len, parts))) as advance:
                for rows, batch in zip(parts, data.in_order(dataset, parts), strict=True):
                    yield rows, batch["image"].to(device, non_blocking=True), batch["label"]
                    advance(len(rows))

        evaluation = Evaluation(self.extractor, max_stored_features=self.max_stored_features)
        return reference_summary(images, evaluation, data=dataset.fingerprint(), n=len(dataset))

    def act(self, trainer: Trainer, module: BaseModule) -> None:
        results = self.measure(trainer, module, self.num_images, self.measures, self.sampler)
        value = results[self.extractor.id.key("fd", self.num_images)].value
        module.results.score("fd", module.batches_seen, value)

    def finish(self, trainer: Trainer, module: BaseModule) -> None:
        assert self._reference is not None  # since `setup`
        n = self._final_images(trainer)
        self._training = self._training or self.summary_of(trainer, "train")
        train_test = frechet_distance(self._reference.moments, self._training.moments)
        measured = self.measure(trainer, module, n, {*self.measures, "fdtrain"})
        name, results = self.extractor.id.key("fd", n), module.results
        value, to_training = measured[name].value, measured[self.extractor.id.key("fdtrain", n)].value
        drawn, seconds = self._pace[None]
        results.record(
            fd=value,
            fd_train=to_training,
            fd_train_test=train_test,
            fd_name=self.prefix + name,
            fd_sampler=of(module, Samples).sampler_name(),
            samples=n,
            samples_per_second=round(drawn / seconds, 1),
        )
        results.row(self.prefix + name, f"{value:.4f}")
        told = "" if self.prefix else " (papers report this)"
        results.row(f"  FD to the training split{told}", f"{to_training:.4f}")
        results.row("  train-test FD (training split against test split)", f"{train_test:.4f}")
        results.row("samples/s", f"{drawn / seconds:.0f}")
        if self.classifier is not None:
            results.record(**self._confidence)
            fraction, classes = self._confidence["confident_fraction"], self._confidence["classes_found"]
            results.row("confident fraction (samples with p > 0.9)", f"{100 * fraction:.1f} %")
            results.row("classes found", str(classes))

    def _final_images(self, trainer: Trainer) -> int:
        data = data_of(trainer, ImageData)  # reconstructions are of the test images, each once
        return self.final_images or len(data.test if self.prefix else data.train)

    def measure(
        self,
        trainer: Trainer,
        module: BaseModule,
        n: int,
        measures: Collection[str],
        sampler: Sampler | None = None,
    ) -> dict[str, Estimate]:
        """The measures, by name, of n samples by the sampler (None: the module's own), on every rank the
        same. Samples of it measured at this step before are not drawn again.
        """
        assert self._reference is not None  # since `setup`
        kept = self._draw(trainer, module, n, sampler)
        summary = kept.evaluation.summary()
        results = compare(self._reference, summary, training=self._training, only=measures)
        suffix = self._suffix(of(module, Samples), sampler)
        named = {f"{self.prefix}{name}{suffix}": estimate for name, estimate in results.items()}
        scores = {name: estimate.value for name, estimate in named.items()}
        scores |= {f"se/{name}": estimate.se for name, estimate in named.items() if estimate.se is not None}
        if kept.predictions is not None:
            self._confidence = kept.predictions.fractions(n)
            scores[f"samples/confident_fraction{suffix}"] = self._confidence["confident_fraction"]
        module.write(scores, kept.step)
        return results

    def _draw(self, trainer: Trainer, module: BaseModule, n: int, sampler: Sampler | None) -> _Drawn:
        """This rank's share of the n samples, in an `Evaluation`."""
        model, step, kept = of(module, Samples), module.batches_seen, self._drawn
        if kept is None or (kept.step, kept.sampler) != (step, sampler) or kept.n > n:
            evaluation = Evaluation(self.extractor, max_stored_features=self.max_stored_features)
            predictions = None if self.classifier is None else Predictions(self.classifier)
            kept = _Drawn(step, sampler, evaluation, predictions)
        begun = time.perf_counter()
        mine = [i for i in range(kept.n, n) if i % trainer.world_size == trainer.global_rank]
        name = self.prefix + self.extractor.id.key("fd", n) + self._suffix(model, sampler)
        show = working(trainer, f"sampling for {name}", len(mine), announce=n != self.num_images)
        with evaluating(trainer), show as advance:
            for start in range(0, len(mine), self.batch_size):
                indices = mine[start : start + self.batch_size]
                images = model.sample(indices, self.seed, sampler)
                kept.evaluation.update(images, torch.tensor(indices))
                if kept.predictions is not None:
                    kept.predictions.update(images)
                advance(len(indices))
        drawn, seconds = self._pace.get(sampler, (0, 0.0))
        self._pace[sampler] = (drawn + n - kept.n, seconds + time.perf_counter() - begun)
        kept.n = n
        self._drawn = kept
        return kept

    @staticmethod
    def _suffix(model: Samples, sampler: Sampler | None) -> str:
        """What tells the numbers of a sampler from those of the module's own."""
        return "" if sampler is None else "_" + re.sub(r"[ ()]", "", model.sampler_name(sampler))
