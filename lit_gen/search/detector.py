"""A detector as the child model of a policy search: what a policy is worth in mAP50 of held-out images.

Plain loops on data in memory, without Lightning, so that a worker process starts in a second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen import rng
from lit_gen.augment import Augmentation
from lit_gen.detection.networks import small_fcos
from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.metrics.detection import mean_average_precision, precision_scores
from lit_gen.schedules import train_one_cycle
from lit_gen.search.rewards import ChildReward


@dataclass(frozen=True)
class Boxed:
    """uint8 images (N, 3, S, S), and of each its boxes (K, 4), xyxy pixels, and labels int64 (K,)."""

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]

    def __len__(self) -> int:
        return len(self.images)


def boxed(dataset: Any, rows: Sequence[int]) -> Boxed:
    """Images `rows` of a detection set (`lit_gen.data.detection`), all of one size."""
    items = [dataset[int(i)] for i in rows]
    if len({item["image"].shape for item in items}) != 1:
        raise ConfigError("A child model is trained on images of one size: set data.image_size.")
    images = torch.stack([item["image"] for item in items])
    return Boxed(images, [item["boxes"] for item in items], [item["labels"] for item in items])


def train_detector(
    data: Boxed,
    augmentation: Augmentation | None,
    *,
    classes: int,
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    width: int = 16,
    seed: int = 0,
) -> nn.Module:
    """`small_fcos` trained with Adam and a one-cycle schedule, in eval mode.

    The augmentation, if there is one, is drawn anew for every image of a batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, "child") % 2**63)
        net = small_fcos(classes, data.images.shape[-1], width)

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            generator = rng.keyed_generator(seed, "child", step)
            rows = torch.randint(len(data), (batch_size,), generator=generator)
            images, boxes = data.images[rows], [data.boxes[i] for i in rows]
            labels = [data.labels[i] for i in rows]
            if augmentation is not None:
                draws = augmentation.sample_batch([len(b) for b in boxes], generator)
                images, boxes, keeps = augmentation.apply_batch(images, boxes, draws, box_format="xyxy")
                boxes = [b[keep] for b, keep in zip(boxes, keeps, strict=True)]
                labels = [y[keep] for y, keep in zip(labels, keeps, strict=True)]
            targets = [{"boxes": b, "labels": y} for b, y in zip(boxes, labels, strict=True)]
            yield reduce(torch.add, net(list(to_float(images)), targets).values())

    train_one_cycle(net, torch.optim.Adam(net.parameters(), lr=learning_rate), losses(), steps)
    return net


@torch.no_grad()
def detection_scores(net: nn.Module, data: Boxed, batch_size: int = 32) -> dict[str, float]:
    """mAP and its parts on the data; see `precision_scores`."""
    metric = mean_average_precision()
    for start in range(0, len(data), batch_size):
        part = slice(start, start + batch_size)
        truth = [{"boxes": b, "labels": y} for b, y in zip(data.boxes[part], data.labels[part], strict=True)]
        metric.update(net(list(to_float(data.images[part]))), truth)
    return precision_scores(metric)


def map50(net: nn.Module, data: Boxed) -> float:
    """Mean average precision on the data, at an overlap of one half."""
    return detection_scores(net, data)["map50"]


class DetectorReward(ChildReward):
    """mAP50 on the validation images of a small detector; `training`: see `train_detector`."""

    fit, score = staticmethod(train_detector), staticmethod(map50)

    def __init__(self, *data: Any, **options: Any):
        super().__init__(*data, **options)
        self.images = self.training.get("steps", 300) * self.training.get("batch_size", 8) * len(self.seeds)
