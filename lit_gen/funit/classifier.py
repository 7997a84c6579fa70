"""Classifiers that measure translations: small ones, trained from scratch where no pretrained network fits
(glyphs, 64 x 64 animals), or the paper's.

The paper's classifiers are Inception-V3 networks fine-tuned on the data (Liu et al. 2019, section 4,
`lit_gen.funit.imagenet`); its few-shot classification extends a 10-layer ResNet by a linear head for unseen
classes (appendix).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.funit.imagenet import InceptionV3
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator
from lit_gen.schedules import train_one_cycle


class ResBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride): two convolutions with batch norm, and the input
    added."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv0 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm0, self.norm1 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        same = c_in == c_out and stride == 1
        self.stride, self.shortcut = stride, None if same else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm0(self.conv0(x)))
        h = self.norm1(self.conv1(h))
        # Thinned out by hand: the backward pass of a 1 x 1 convolution with stride 2 writes past its memory
        # in torch 2.15 on the CPU, for fewer than 8 channels in channels_last.
        return F.relu(
            h + (x if self.shortcut is None else self.shortcut(x[..., :: self.stride, :: self.stride]))
        )


class ResNet10(nn.Module):
    """A convolution, four residual blocks (widths w, 2w, 4w, 8w, halving from the second on), a linear layer.

    Images are uint8 (N, C, H, W) of 8 x 8 pixels or more.
    """

    name = "resnet10"

    def __init__(self, num_classes: int, channels: int = 3, width: int = 32):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("channels", channels), ("width", width)):
            if value < 1:
                raise ConfigError(f"{name}={value}: a classifier needs at least 1.")
        self.config = {"num_classes": num_classes, "channels": channels, "width": width}
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *(ResBlock(widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(4))
        )
        self.num_features = widths[-1]
        self.head = nn.Linear(self.num_features, num_classes)

    def maps(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 8 width, H / 8, W / 8): what DIPD compares."""
        return self.blocks(F.relu(self.norm(self.stem(to_float(images).to(self.stem.weight)))))

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 8 width): what a linear head and a Frechet distance take."""
        return self.maps(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.features(images))


Classifier = ResNet10 | InceptionV3


def train_classifier(
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    shift: int = 2,
    flip: bool = False,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> Classifier:
    """Trains on uint8 images (N, C, H, W) and labels (N,); returns the network in eval mode.

    AdamW with a one-cycle rate, random shifts by up to `shift` pixels and, with `flip`, mirror images (right
    for animals, wrong for letters). Batches and augmentation are a function of the seed and the step.
    `advance(1)` is called after every step. Raises ConfigError for labels that the network has no
    class for.
    """
    if len(images) != len(labels) or not len(images):
        raise ConfigError(
            f"{len(images)} images and {len(labels)} labels: give one label to each, and at least one."
        )
    if int(labels.max()) >= network.head.out_features:
        raise ConfigError(
            f"Label {int(labels.max())} for a classifier of {network.head.out_features} classes."
        )
    device = network.head.weight.device

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            generator = keyed_generator(seed, "classifier", step)
            rows = torch.randint(len(images), (batch_size,), generator=generator)
            batch = _augmented(images[rows], shift, flip, generator).to(device)
            yield F.cross_entropy(network(batch), labels[rows].to(device), label_smoothing=label_smoothing)

    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    train_one_cycle(network, optimizer, losses(), steps, advance)
    return network


def _augmented(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Every image moved by its own (dx, dy), the border repeated; every other one mirrored, by chance."""
    n, _, height, width = images.shape
    moves = torch.randint(-shift, shift + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image, channel = torch.arange(n).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits of uint8 images (N, C, H, W) in batches, on the CPU: (N, num_classes)."""
    device = next(network.parameters()).device
    return torch.cat([network(batch.to(device)).cpu() for batch in images.split(batch_size)])


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images whose class is predicted. Images are (N, C, H, W), labels int64 (N,)."""
    return (predict(network, images).argmax(1) == labels.cpu()).double().mean().item()


def fit_head(
    features: Tensor, labels: Tensor, num_classes: int, *, weight_decay: float = 1e-3, iterations: int = 100
) -> nn.Linear:
    """A linear classifier of fixed features (N, D): multinomial logistic regression with an L2 penalty,
    solved by L-BFGS.

    The few-shot classification of the paper: fitted to one real image a class, or to that and its
    translations.
    """
    if len(features) != len(labels):
        raise ConfigError(f"{len(features)} features and {len(labels)} labels: give one label to each.")
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = (x - mean) / std
    head = nn.Linear(x.shape[1], num_classes).to(x)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(head(x), labels) + weight_decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():  # the standardization of the features is folded into the layer
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)
    return head.to(features)


def save_classifier(
    network: Classifier, path: str | Path, classes: list[str], accuracy: float | None = None
) -> Path:
    """Writes {"config", "classes", "accuracy", "state_dict"}, whole or not at all: what `load_classifier`
    reads with `weights_only=True`. `accuracy`: that on images it has not seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"config": network.config, "classes": list(classes), "accuracy": accuracy}
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        torch.save(content | {"state_dict": network.state_dict()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load_classifier(path: str | Path) -> tuple[Classifier, list[str], float | None]:
    """The classifier in eval mode, the names of its classes and its accuracy, where that was saved. Raises
    ConfigError if the file holds none."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no classifier {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config = dict(content["config"])
        made_of = InceptionV3 if config.pop("network", None) == InceptionV3.name else ResNet10
        network = made_of(**config)
        network.load_state_dict(content["state_dict"])
        classes, right = content["classes"], content.get("accuracy")
    except Exception as error:  # torch raises half a dozen types here; all mean the same to the user
        raise ConfigError(f"{path} holds no classifier of lit_gen: {str(error).splitlines()[0]}") from error
    return network.eval(), classes, right
