"""Classifiers that judge few-shot translations: trained on the data themselves, once, and kept in the cache.

The paper's judges are Inception-V3 networks fine-tuned on the data set, one on all classes and one on the
target classes (Liu et al. 2019, section 4, https://arxiv.org/abs/1905.01723). These are ResNet-10s, or those
where the weights to start from are at hand.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.errors import ConfigError
from lit_gen.funit.classifier import (
    Classifier,
    ResNet10,
    accuracy,
    load_classifier,
    save_classifier,
    train_classifier,
)
from lit_gen.funit.imagenet import InceptionV3
from lit_gen.metrics import ExtractorId
from lit_gen.metrics.distributed import from_rank_zero
from lit_gen.metrics.reference import cache_folder
from lit_gen.metrics.weights_files import Published, find_weights, sha256_of

__all__ = [
    "KINDS",
    "Schooling",
    "Verdict",
    "all_images",
    "extractor_id",
    "has_contents",
    "judge",
    "weights_of",
]

KINDS = ("test", "all", "source", "content")
"""Which classes a judge tells apart: the target ones, all, the source ones, or the contents (letters)."""

TORCHVISION = {
    "inception": ("Inception-V3", "inception_v3_google-0cc3c7bd.pth", "104 MB", "the judges are ResNet-10s"),
    "vgg": ("VGG-16", "vgg16-397923af.pth", "528 MB", "DIPD is that of the judge's own maps"),
    "lpips": ("AlexNet", "alexnet-owt-7be5be79.pth", "233 MB", "there is no LPIPS"),
}


def weights_of(name: str, given: str) -> Path:
    """The file of torchvision's ImageNet weights that `judges.<name>=<given>` means; "auto": the published
    one, from $LITGEN_WEIGHTS, torch's cache or the net. Raises ConfigError where it cannot be had."""
    what, file, size, otherwise = TORCHVISION[name]
    if given != "auto":
        if not Path(given).is_file():
            raise ConfigError(
                f"judges.{name}={given}: there is no such file of torchvision's {what} ({file}, {size})."
            )
        return Path(given)
    instead = f"give judges.{name}=<that file>, or leave judges.{name} out: {otherwise} then"
    url, prefix = f"https://download.pytorch.org/models/{file}", file[:-4].rsplit("-", 1)[1]
    published = Published(f"torchvision's {what} of ImageNet", [file], url, prefix, size, instead)
    return find_weights(published)[0]


@dataclass(frozen=True)
class Schooling:
    """How a judge is trained: `ResNet10(width)` by `train_classifier`. `held_out` of the images are kept to
    say how good it is; `flip` mirrors (animals, not letters). `steps` of a fine-tuned network are the same,
    its `lr` is its own."""

    steps: int = 800
    width: int = 16
    batch_size: int = 64
    lr: float = 2e-3
    shift: int = 2
    flip: bool = False
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"judge.held_out={self.held_out}: must be a share of the images, for instance 0.2."
            )
        if self.steps < 1:
            raise ConfigError(f"judge.steps={self.steps}: must be at least 1.")


@dataclass(frozen=True)
class Verdict:
    """A judge, the names of its classes and its accuracy on images that it was not trained on."""

    network: Classifier
    classes: list[str]
    accuracy: float


def judge(
    data: FewShotDataModule,
    kind: str,
    schooling: Schooling | None = None,
    folder: Path | None = None,
    inception: Path | None = None,
    device: torch.device | str = "cpu",
) -> Verdict:
    """The judge of a kind on a device, from the cache or else trained there. Every rank must call it; rank 0
    trains.

    `inception`: torchvision's Inception-V3 weights, to be fine-tuned, instead of a ResNet-10 from nothing.
    Its accuracy is that on a fifth (`held_out`) of the images; the content judge's is that on the images of
    the target classes, of which it sees none. Raises ConfigError for another kind than `KINDS`, and for
    "content" where the data do not know their contents.
    """
    schooling = schooling or Schooling()
    if kind not in KINDS:
        raise ConfigError(f"There is no judge {kind!r}; the kinds are {', '.join(KINDS)}.")
    if kind == "content" and not has_contents(data):
        raise ConfigError("The data do not say what their images show: there is no content to be judged.")
    key = {
        "kind": kind,
        "data": [data.train.fingerprint(), data.test.fingerprint()],
        "schooling": asdict(schooling),
        "format": 1,
    }
    if inception is not None:
        key["inception"] = sha256_of(inception)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or cache_folder() / "judges") / f"{kind}-{digest}.pt"
    made = partial(_train, data, kind, schooling, path, inception, device)
    from_rank_zero(lambda: None if path.is_file() else str(made()))
    network, classes = load_classifier(path)
    network.to(device)
    _, (images, labels) = _lessons(data, kind, schooling)
    return Verdict(network.requires_grad_(False), classes, accuracy(network, images, labels))


def has_contents(data: FewShotDataModule) -> bool:
    """Whether an image says what it shows apart from its class: glyphs do."""
    return "content" in data.train[0]


def all_images(dataset: Any, field: str = "label") -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) and int64 (N,) of a whole `Selection`."""
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([item["image"] for item in items]), torch.tensor([item[field] for item in items])


def extractor_id(verdict: Verdict, kind: str) -> ExtractorId:
    """What a distance of this judge's features is called by (the rule of `lit_gen.metrics`)."""
    digest = hashlib.sha256()
    for name, value in sorted(verdict.network.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    network = verdict.network
    resize = "bilinear299" if isinstance(network, InceptionV3) else "none"
    return ExtractorId(
        f"{network.name}-{kind}", "1", digest.hexdigest(), resize, "pool", network.num_features
    )


def _train(
    data: FewShotDataModule,
    kind: str,
    schooling: Schooling,
    path: Path,
    inception: Path | None,
    device: torch.device | str,
) -> Path:
    (images, labels), _ = _lessons(data, kind, schooling)
    classes = _classes(data, kind)
    torch.manual_seed(schooling.seed)  # the initial weights
    if inception is None:
        network, lr = ResNet10(len(classes), images.shape[1], schooling.width), schooling.lr
    else:
        network = InceptionV3(len(classes), images.shape[1]).load_imagenet(inception)
        lr = network.fine_tuning_lr
    with torch.enable_grad():
        network = train_classifier(
            network.to(device),
            images,
            labels,
            steps=schooling.steps,
            batch_size=schooling.batch_size,
            lr=lr,
            shift=schooling.shift,
            flip=schooling.flip,
            seed=schooling.seed,
        )
    return save_classifier(network, path, classes)


def _classes(data: FewShotDataModule, kind: str) -> list[str]:
    if kind == "content":
        return [str(c) for c in range(int(all_images(data.train, "content")[1].max()) + 1)]
    return {"test": data.test.classes, "all": data.classes, "source": data.train.classes}[kind]


def _lessons(
    data: FewShotDataModule, kind: str, schooling: Schooling
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to learn from, and those to be examined with."""
    if kind == "content":
        return all_images(data.train, "content"), all_images(data.test, "content")
    parts = [
        all_images(part)
        for part in {"test": [data.test], "source": [data.train]}.get(kind, [data.train, data.test])
    ]
    if kind == "all":
        parts[1] = parts[1][0], parts[1][1] + len(data.train.classes)
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(schooling.seed))
    cut = max(1, round(schooling.held_out * len(images)))
    examined, learned = order[:cut], order[cut:]
    return (images[learned], labels[learned]), (images[examined], labels[examined])
