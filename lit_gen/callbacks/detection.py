"""The mean average precision of a detector on the test images while it trains, and pictures of what it
finds."""

from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_gen.callbacks.contracts import Data, Detects, Periodic, data_of, of
from lit_gen.callbacks.ema import evaluating
from lit_gen.callbacks.grid import show
from lit_gen.callbacks.validation import TestBatches
from lit_gen.errors import ConfigError
from lit_gen.images import boxed_picture, grid, one_size, to_uint8
from lit_gen.metrics.detection import mean_average_precision, precision_scores
from lit_gen.module import BaseModule


@runtime_checkable
class DetectionData(Data, Protocol):
    """Data of objects of named classes."""

    @property
    def classes(self) -> list[str]: ...


TRUE, FOUND = (64, 255, 64), (255, 96, 32)


class DetectionQuality(Periodic):
    """Every `every` batches and at the end, with the EMA weights: `val/map`, `val/map50`, `val/map75` over
    the test images, and a picture of the first `pictures` of them: what is there in green, what was found
    with a score of at least `shown` in orange (`grids/detections_<batches>.png`, W&B's `samples/detections`).

    The module finds: `module.detect(images) -> [{"boxes", "scores", "labels"}]`. The score `map50`
    is what the best checkpoint can be chosen by.
    """

    requires = Detects

    def __init__(self, every: int = 500, pictures: int = 8, shown: float = 0.3):
        super().__init__(every, "callbacks.quality")
        if pictures < 0 or not 0 <= shown <= 1:
            raise ConfigError(
                f"callbacks.quality: pictures={pictures} must be at least 0, shown={shown} a score in [0, 1]."
            )
        self.pictures, self.shown = pictures, shown
        self._measured, self._scores = -1, {}
        self._batches = TestBatches()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batches.close()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mean_average_precision()  # what is missing should be said before the training

    def finish(self, trainer: Trainer, module: BaseModule) -> None:
        self.act(trainer, module)
        module.results.record(**self._scores)
        for name, value in self._scores.items():
            module.results.row(f"{name} on the test images", f"{value:.4f}")

    def act(self, trainer: Trainer, module: BaseModule) -> None:
        """Measures over all ranks' test images, once a batch count."""
        step, data = module.batches_seen, data_of(trainer, DetectionData)
        if self._measured == step:
            return
        metric = mean_average_precision().to(module.device)
        drawn: list[Tensor] = []
        with evaluating(trainer):
            for batch in self._batches(trainer, module):
                found = of(module, Detects).detect(batch["image"])
                pairs = zip(batch["boxes"], batch["labels"], strict=True)
                truth = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]
                metric.update(found, truth)
                rows = range(min(self.pictures - len(drawn), len(found)))
                drawn += [self._drawn(batch["image"][i], truth[i], found[i], data.classes) for i in rows]
        scores = precision_scores(metric)
        module.write({f"val/{name}": value for name, value in scores.items()}, step)
        for name, value in scores.items():
            module.results.score(name, step, value)
        if drawn and trainer.is_global_zero:
            picture = grid(one_size(drawn), columns=min(4, len(drawn)))
            show(trainer, "detections", picture, step, f"batch {step}, EMA weights")
        self._measured, self._scores = step, scores

    def _drawn(
        self, image: Tensor, truth: dict[str, Tensor], found: dict[str, Tensor], classes: list[str]
    ) -> Tensor:
        sure = found["scores"] >= self.shown
        texts = [
            f"{classes[k]} {s:.2f}"
            for k, s in zip(found["labels"][sure].tolist(), found["scores"][sure].tolist(), strict=True)
        ]
        boxes = torch.cat([truth["boxes"], found["boxes"][sure]]).cpu()
        there, scale = len(truth["boxes"]), max(1, 224 // max(image.shape[-2:]))
        colors = [TRUE] * there + [FOUND] * len(texts)
        return boxed_picture(to_uint8(image).cpu(), boxes, colors, [""] * there + texts, scale=scale)
