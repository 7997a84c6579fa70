"""The mean average precision of a detector on the test images while it trains, and pictures of what it
finds."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.grid import show
from lit_gen.callbacks.validation import TestBatches
from lit_gen.errors import ConfigError
from lit_gen.images import boxed_picture, grid, one_size, to_uint8
from lit_gen.metrics.detection import mean_average_precision, precision_scores

__all__ = ["DetectionQuality"]

TRUE, FOUND = (64, 255, 64), (255, 96, 32)


class DetectionQuality(pl.Callback):
    """Every `every` batches and at the end, with the EMA weights: `val/map`, `val/map50`, `val/map75` over
    the test images, and a picture of the first `pictures` of them: what is there in green, what was found
    with a score of at least `shown` in orange (`grids/detections_<batches>.png`, W&B's `samples/detections`).

    The module finds: `module.detect(images) -> [{"boxes", "scores", "labels"}]`. `module.scores["map50"]` is
    what the best checkpoint can be chosen by.
    """

    asks = ("detect",)

    def __init__(self, every: int = 500, pictures: int = 8, shown: float = 0.3):
        if every < 1 or pictures < 0 or not 0 <= shown <= 1:
            raise ConfigError(
                f"callbacks.quality: every={every} must be at least 1, pictures={pictures} at least 0 and "
                f"shown={shown} a score in [0, 1]."
            )
        self.every, self.pictures, self.shown = every, pictures, shown
        self._measured = -1
        self._batches = TestBatches()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._batches.close()

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        mean_average_precision()  # what is missing should be said before the training

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.batches_seen % self.every == 0:
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        scores = self.measure(trainer, pl_module)
        pl_module.summary |= scores
        pl_module.closing |= {f"{name} on the test images": f"{v:.4f}" for name, v in scores.items()}

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        """The scores over all ranks' test images, measured once a batch count."""
        step, data = pl_module.batches_seen, trainer.datamodule
        if self._measured == step:
            return {name: pl_module.scores[name][1] for name in ("map", "map50", "map75")}
        metric = mean_average_precision().to(pl_module.device)
        drawn: list[Tensor] = []
        with evaluating(trainer):
            for batch in self._batches(trainer, pl_module):
                found = pl_module.detect(batch["image"])
                truth = [
                    {"boxes": b, "labels": y} for b, y in zip(batch["boxes"], batch["labels"], strict=True)
                ]
                metric.update(found, truth)
                rows = range(min(self.pictures - len(drawn), len(found)))
                drawn += [self._drawn(batch["image"][i], truth[i], found[i], data.classes) for i in rows]
        scores = precision_scores(metric)
        pl_module.write({f"val/{name}": value for name, value in scores.items()}, step)
        pl_module.scores |= {name: (step, value) for name, value in scores.items()}
        if drawn and trainer.is_global_zero:
            show(
                trainer,
                "detections",
                grid(one_size(drawn), columns=min(4, len(drawn))),
                step,
                f"batch {step}, EMA weights",
            )
        self._measured = step
        return scores

    def _drawn(
        self, image: Tensor, truth: dict[str, Tensor], found: dict[str, Tensor], classes: list[str]
    ) -> Tensor:
        sure = found["scores"] >= self.shown
        texts = [
            f"{classes[k]} {s:.2f}"
            for k, s in zip(found["labels"][sure].tolist(), found["scores"][sure].tolist(), strict=True)
        ]
        boxes = torch.cat([truth["boxes"], found["boxes"][sure]]).cpu()
        there = len(truth["boxes"])
        return boxed_picture(
            to_uint8(image).cpu(),
            boxes,
            [TRUE] * there + [FOUND] * len(texts),
            [""] * there + texts,
            scale=max(1, 224 // max(image.shape[-2:])),
        )
