"""The Frechet distance of samples to the test images while a model trains."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gen.callbacks.checkpoint import Checkpoint
from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.progress import working
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

Sampler = Callable[..., Tensor]
CLASSES = 1024  # of a classifier, at most


@dataclass
class _Drawn:
    """What is kept of the samples of one step and one sampler."""

    step: int
    sampler: Sampler | None
    evaluation: Evaluation
    sure: Tensor  # how many samples the classifier is sure of, for each class; the last: it is not
    n: int = 0


class SampleQuality(pl.Callback):
    """Every `every` batches the Frechet distance of `num_images` samples (EMA weights, seeds fixed) to the
    test split; at the end that of `final_images` (None: as many as the training split has) beside its floor,
    the distance of the training split itself to the test split.

    Logged under the extractor's full name (`ExtractorId.key`), because distances by different networks do not
    compare, and kept as `module.scores["fd"]` for the choice of the best checkpoint. Image i is sampled by
    rank i mod W and depends on its seed alone, so the distance does not depend on the number of devices.

    `sampler` is the one of the distances while training, None the module's own. A recipe whose own takes a
    thousand evaluations an image is followed by one of a few dozen; its numbers have its name
    (`fid5k_heun18steps`), and they alone choose the best checkpoint. The last measurement is by the module's
    own sampler, as is `lit-gen evaluate` of the best checkpoint.

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
        sampler: Sampler | None = None,
    ):
        check_measures(measures)
        if "fd" not in measures:
            raise ConfigError(f"callbacks.quality.measures={list(measures)}: fd must be among them.")
        if "fdclass" in measures:
            raise ConfigError("fdclass is measured after the training: lit-gen evaluate per_class=true.")
        if every < 1 or num_images < 2:
            raise ConfigError(
                f"callbacks.quality: every={every} must be at least 1 and num_images={num_images} at least 2."
            )
        self.extractor, self.classifier, self.sampler = extractor, classifier, sampler
        self.every, self.num_images, self.final_images = every, num_images, final_images
        self.seed, self.batch_size = seed, batch_size
        self.measures, self.reservoir = tuple(measures), reservoir
        self._reference: Moments | Summary | None = None
        self._training: Summary | None = None
        self._drawn: _Drawn | None = None
        self._pace: dict[Sampler | None, tuple[int, float]] = {}  # samples so far, and the time they took
        self._running_name = ""  # of the distances while training

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.sampler is not None:
            pl_module.check(self.sampler)
        known_by_moments = {"fd", "fdinf", "is", "authpct"}.issuperset(self.measures)
        self._reference = (self.moments_of if known_by_moments else self.summary_of)(trainer, "test")
        self._training = self.summary_of(trainer, "train") if "authpct" in self.measures else None

    def state_dict(self) -> dict[str, Any]:
        return {"running_name": self._running_name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._running_name = state["running_name"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        before = self._running_name
        own = self.extractor.id.key("fd", self.num_images)
        self._running_name = own + self._suffix(pl_module, self.sampler)
        if before and before != self._running_name:
            rank_zero_warn(
                f"The best checkpoint is chosen anew: the run measured {before} until now, which does not "
                f"compare with {self._running_name}."
            )
            for callback in trainer.callbacks:
                if isinstance(callback, Checkpoint) and callback.monitor == "fd":
                    callback.best = callback.best_step = None

    def moments_of(self, trainer: pl.Trainer, split: str) -> Moments:
        """Moments of a split's features, from the cache where they are known. Every rank must call it."""
        dataset = trainer.datamodule.dataset(split)
        return reference_moments(
            lambda: self._images(trainer, split),
            self.extractor,
            data=dataset.fingerprint(),
            split=split,
            n=len(dataset),
        )

    def summary_of(self, trainer: pl.Trainer, split: str) -> Summary:
        """As `moments_of`, with a random part of the features."""
        dataset = trainer.datamodule.dataset(split)
        return reference_summary(
            lambda: self._images(trainer, split),
            self.extractor,
            data=dataset.fingerprint(),
            split=split,
            n=len(dataset),
            reservoir=self.reservoir,
        )

    def _images(self, trainer: pl.Trainer, split: str) -> Iterator[tuple[range, Tensor, Tensor]]:
        """This rank's share of a split, on its device; in `setup` the module is not there yet."""
        dataset, device = trainer.datamodule.dataset(split), trainer.strategy.root_device
        parts = own_batches(len(dataset), self.batch_size)
        loader = trainer.datamodule.in_order(dataset, parts)
        what = f"{self.extractor.id.name} features of the {split} images, computed once"
        with working(trainer, what, sum(map(len, parts))) as advance:
            for rows, batch in zip(parts, loader, strict=True):
                yield rows, batch["image"].to(device, non_blocking=True), batch["label"]
                advance(len(rows))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen % self.every == 0:
            value = self.measure(trainer, pl_module, self.num_images, self.sampler)
            pl_module.scores["fd"] = (pl_module.batches_seen, value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        n = self.final_images or len(trainer.datamodule.train)
        value = self.measure(trainer, pl_module, n)
        reference = self._reference if isinstance(self._reference, Moments) else self._reference.moments
        floor = frechet_distance(reference, self.moments_of(trainer, "train"))
        drawn, seconds = self._pace[None]
        pl_module.summary |= {
            "fd": value,
            "fd_floor": floor,
            "fd_name": self.extractor.id.key("fd", n),
            "fd_sampler": pl_module.sampler_name(),
            "samples": n,
            "samples_per_second": round(drawn / seconds, 1),
        }
        if self.classifier is not None:
            confident, classes = self._judged
            pl_module.summary |= {"confident_share": confident, "classes_found": classes}

    def measure(self, trainer: pl.Trainer, pl_module: Any, n: int, sampler: Sampler | None = None) -> float:
        """The distance of n samples by the sampler (None: the module's own), on every rank the same. Samples
        of it measured at this step before are not drawn again.
        """
        kept = self._draw(trainer, pl_module, n, sampler)
        summary = kept.evaluation.summary()
        results = compare(self._reference, summary, training=self._training, only=self.measures)
        suffix = self._suffix(pl_module, sampler)
        scores = {name + suffix: estimate.value for name, estimate in results.items()}
        scores |= {
            f"se/{name}{suffix}": estimate.se for name, estimate in results.items() if estimate.se is not None
        }
        if self.classifier is not None:
            self._judged = self._judge(trainer, kept.sure, n)
            scores[f"samples/confident_share{suffix}"] = self._judged[0]
        pl_module.write(scores, kept.step)
        return results[self.extractor.id.key("fd", n)].value

    def _draw(self, trainer: pl.Trainer, pl_module: Any, n: int, sampler: Sampler | None) -> _Drawn:
        """This rank's share of the n samples, in an `Evaluation`."""
        step, kept = pl_module.batches_seen, self._drawn
        if kept is None or (kept.step, kept.sampler) != (step, sampler) or kept.n > n:
            sure = torch.zeros(CLASSES + 1, device=pl_module.device)
            kept = _Drawn(step, sampler, Evaluation(self.extractor, reservoir=self.reservoir), sure)
        begun = time.perf_counter()
        mine = [i for i in range(kept.n, n) if i % trainer.world_size == trainer.global_rank]
        name = self.extractor.id.key("fd", n) + self._suffix(pl_module, sampler)
        show = working(trainer, f"sampling for {name}", len(mine), announce=n != self.num_images)
        with evaluating(trainer), show as advance:
            for start in range(0, len(mine), self.batch_size):
                indices = mine[start : start + self.batch_size]
                images = pl_module.sample(indices, self.seed, sampler)
                kept.evaluation.update(images, torch.tensor(indices))
                if self.classifier is not None:
                    p, found = self.classifier.with_logits(images)[1].softmax(1).max(1)
                    kept.sure.index_add_(0, found.where(p > 0.9, CLASSES), torch.ones_like(p))
                advance(len(indices))
        drawn, seconds = self._pace.get(sampler, (0, 0.0))
        self._pace[sampler] = (drawn + n - kept.n, seconds + time.perf_counter() - begun)
        kept.n = n
        self._drawn = kept
        return kept

    def _suffix(self, pl_module: Any, sampler: Sampler | None) -> str:
        """What tells the numbers of a sampler from those of the module's own."""
        return "" if sampler is None else "_" + re.sub(r"[ ()]", "", pl_module.sampler_name(sampler))

    def _judge(self, trainer: pl.Trainer, sure: Tensor, n: int) -> tuple[float, int]:
        """The share of the n samples that are sure, and how many classes those have, over all ranks."""
        if trainer.world_size > 1:
            sure = trainer.strategy.reduce(sure.clone(), reduce_op="sum")
        return float(sure[:CLASSES].sum() / n), int((sure[:CLASSES] > 0).sum())
