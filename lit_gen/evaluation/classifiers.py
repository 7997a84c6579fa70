"""Classifiers that evaluate few-shot translations: trained on the data themselves, once, and cached.

The paper's are Inception-V3 networks fine-tuned on the data set, one on all classes and one on the
target classes (Liu et al. 2019, section 4, https://arxiv.org/abs/1905.01723). These are ResNet-10s, or those
where the weights to start from are at hand.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gen.callbacks.progress import ProgressBar
from lit_gen.data.fewshot import Selection
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
from lit_gen.metrics.distributed import long_from_rank_zero
from lit_gen.metrics.reference import cache_folder
from lit_gen.metrics.weights_files import Published, find_weights, sha256_of

log = logging.getLogger(__name__)


KINDS = {
    "test": "the target classes",
    "all": "all classes",
    "source": "the source classes",
    "content": "the contents",
}
"""The classes of each kind of classifier; contents are letters, for instance."""

Report = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""`with report(what, total) as advance:`, then `advance(n)` after n items: `lit_gen.callbacks.progress`."""

TORCHVISION = {
    "inception": ("Inception-V3", "inception_v3_google-0cc3c7bd.pth", "104 MB", "they are ResNet-10s"),
    "vgg": ("VGG-16", "vgg16-397923af.pth", "528 MB", "DIPD is that of the classifier's own maps"),
    "lpips": ("AlexNet", "alexnet-owt-7be5be79.pth", "233 MB", "there is no LPIPS"),
}


def weights_of(name: str, given: str) -> Path:
    """The file of torchvision's ImageNet weights that `<name>=<given>` means; "auto": the published
    one, from $LITGEN_WEIGHTS, torch's cache or the net. Raises ConfigError where it cannot be had."""
    what, file, size, otherwise = TORCHVISION[name]
    if given != "auto":
        if not Path(given).is_file():
            raise ConfigError(
                f"{name}={given}: there is no such file of torchvision's {what} ({file}, {size})."
            )
        return Path(given)
    instead = f"give {name}=<that file>, or leave {name} out: {otherwise} then"
    url, prefix = f"https://download.pytorch.org/models/{file}", file[:-4].rsplit("-", 1)[1]
    published = Published(f"torchvision's {what} of ImageNet", [file], url, prefix, size, instead)
    return find_weights(published)[0]


@dataclass(frozen=True)
class ClassifierTraining:
    """How an evaluation classifier is trained: `ResNet10(width)` by `train_classifier`. `held_out` of the
    images are kept to say how good it is; `flip` mirrors (animals, not letters). `steps` of a
    fine-tuned network are the same, its `lr` is its own."""

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
                f"metrics.classifiers.held_out={self.held_out}: must be a fraction of the images, as 0.2 is."
            )
        if self.steps < 1:
            raise ConfigError(f"metrics.classifiers.steps={self.steps}: must be at least 1.")


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier, the names of its classes and its accuracy on images that it was not trained on."""

    network: Classifier
    classes: list[str]
    accuracy: float


def evaluation_classifier(
    data: FewShotDataModule,
    kind: str,
    training: ClassifierTraining | None = None,
    folder: Path | None = None,
    inception: Path | None = None,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> TrainedClassifier:
    """The classifier of a kind on a device, from the cache or else trained there. Every rank must call it;
    rank 0 reads or trains, says so, shows by `report` (None: a bar of its own) how far it is, and sends the
    result to the others.

    `inception`: torchvision's Inception-V3 weights, to be fine-tuned, instead of a ResNet-10 from nothing.
    Its accuracy is that on a fifth (`held_out`) of the images; that of contents is the one on the images of
    the target classes, of which it sees none. Global random generators are left as they were. Raises
    ConfigError for another kind than `KINDS`, and for "content" where the data do not know their contents.
    """
    training = training or ClassifierTraining()
    if kind not in KINDS:
        raise ConfigError(f"There is no classifier {kind!r}; the kinds are {', '.join(KINDS)}.")
    if kind == "content" and not has_contents(data):
        raise ConfigError("The data do not say what their images show: there is no content to classify.")
    report = report or partial(ProgressBar().work, announce=False)
    made_by = _Maker(data, kind, training, inception, torch.device(device), report)

    def compute(beat: Callable[[], None]) -> TrainedClassifier:
        path = (folder or cache_folder() / "classifiers") / f"{kind}-{made_by.digest()}.pt"
        with _random_numbers_from(training.seed, made_by.device):
            return _kept(path) or made_by(path, beat)

    classifier = long_from_rank_zero(compute)
    classifier.network.to(device)
    return classifier


def _kept(path: Path) -> TrainedClassifier | None:
    if not path.is_file():
        return None
    try:
        network, classes, right = load_classifier(path)
    except ConfigError as error:  # whatever is wrong with a cache file, the remedy is to train again
        log.warning("Training an evaluation classifier again: %s", error)
        return None
    if right is None:
        return None  # a file that lit_gen did not write
    return TrainedClassifier(network.requires_grad_(False), classes, right)


@contextmanager
def _random_numbers_from(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators, from which initial weights and dropout are drawn, begin at `seed` inside and are
    afterwards as before: a training goes on alike whether or not it has trained a classifier."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def has_contents(data: FewShotDataModule) -> bool:
    """Whether an image says what it shows apart from its class: glyphs do."""
    return "content" in data.train[0]


def all_images(
    dataset: Any, field: str = "label", advance: Callable[[int], None] = lambda n: None
) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) and int64 (N,) of a whole `Selection`; `advance(1)` after each image."""
    images, values = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        images.append(item["image"])
        values.append(item[field])
        advance(1)
    return torch.stack(images), torch.tensor(values)


def extractor_id(classifier: TrainedClassifier, kind: str) -> ExtractorId:
    """What a distance of this classifier's features is called by (the rule of `lit_gen.metrics`)."""
    digest = hashlib.sha256()
    for name, value in sorted(classifier.network.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    network = classifier.network
    resize = "bilinear299" if isinstance(network, InceptionV3) else "none"
    return ExtractorId(
        f"{network.name}-{kind}", "1", digest.hexdigest(), resize, "pool", network.num_features
    )


@dataclass(frozen=True)
class _Maker:
    """Trains a classifier of a kind on data, and keeps it."""

    data: FewShotDataModule
    kind: str
    training: ClassifierTraining
    inception: Path | None
    device: torch.device
    report: Report

    def digest(self) -> str:
        """Of all that the classifier depends on."""
        key = {
            "kind": self.kind,
            "data": [self.data.train.fingerprint(), self.data.test.fingerprint()],
            "schooling": asdict(self.training),
            "format": 2,
        }
        if self.inception is not None:
            key["inception"] = sha256_of(self.inception)
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def __call__(self, path: Path, beat: Callable[[], None]) -> TrainedClassifier:
        """Trained on the device, then on the CPU; `beat` is called as often as something has been done."""
        what, steps = f"evaluation classifier ({self.kind})", self.training.steps
        print(f"Training an {what} on {KINDS[self.kind]}: {steps} steps, once; kept as {path}", flush=True)
        with self.report("reading its images", sum(map(len, self._parts()))) as advance:
            (images, labels), test = self._split(_both(advance, beat))
        if self.kind == "content":
            classes = [str(c) for c in range(int(labels.max()) + 1)]
        else:
            classes = [name for part in self._parts() for name in part.classes]
        network, lr = self._untrained(len(classes), images.shape[1])
        options = {name: getattr(self.training, name) for name in ("batch_size", "shift", "flip", "seed")}
        with torch.enable_grad(), self.report(what, steps) as advance:
            seen = _both(advance, beat)
            train_classifier(network, images, labels, steps=steps, lr=lr, advance=seen, **options)
        classifier = TrainedClassifier(network.requires_grad_(False), classes, accuracy(network, *test))
        try:
            save_classifier(network.cpu(), path, classes, classifier.accuracy)
        except OSError as error:
            log.warning("%s could not be kept (%s); the next run trains it again.", path, error)
        return classifier

    def _untrained(self, num_classes: int, channels: int) -> tuple[Classifier, float]:
        """(network on the device, its learning rate)."""
        if self.inception is None:
            network = ResNet10(num_classes, channels, self.training.width)
            return network.to(self.device), self.training.lr
        network = InceptionV3(num_classes, channels).load_imagenet(self.inception)
        return network.to(self.device), network.fine_tuning_lr

    def _parts(self) -> list[Selection]:
        data = self.data
        return {"test": [data.test], "source": [data.train]}.get(self.kind, [data.train, data.test])

    def _split(self, advance: Callable[[int], None]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(images, labels) of the training and of the test split."""
        parts, content = self._parts(), self.kind == "content"
        sets = [all_images(part, "content" if content else "label", advance) for part in parts]
        images, labels = (torch.cat(x) for x in zip(*sets, strict=True))
        first = len(parts[0])
        if content:
            return (images[:first], labels[:first]), (images[first:], labels[first:])
        labels[first:] += len(parts[0].classes)
        generator = torch.Generator().manual_seed(self.training.seed)
        order = torch.randperm(len(images), generator=generator)
        cut = max(1, round(self.training.held_out * len(images)))
        test, train = order[:cut], order[cut:]
        return (images[train], labels[train]), (images[test], labels[test])


def _both(advance: Callable[[int], None], beat: Callable[[], None]) -> Callable[[int], None]:
    def call(n: int) -> None:
        advance(n)
        beat()

    return call
