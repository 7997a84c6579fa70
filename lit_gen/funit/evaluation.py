"""The evaluation protocol of FUNIT (Liu et al. 2019, section 4, https://arxiv.org/abs/1905.01723).

N content images of source classes are translated into each target class, shown by K images that are the same
for every method. Classifiers, feature networks and, where it exists, the true translation measure the N x T
results. Images are uint8 (N, C, H, W) throughout. Networks come as plain callables, so that any will do.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lit_gen.errors import ConfigError
from lit_gen.images import to_float

WINDOW = 11  # pixels, of SSIM
Translator = Callable[[Tensor, Tensor], Tensor]
"""Content images (N, C, H, W) and K class images (K, C, H, W), float in [-1, 1] -> translations, uint8 (N, C,
H, W)."""


# --- baselines ---


def copy_content(content: Tensor, classes: Tensor) -> Tensor:
    """The baseline that changes nothing: perfect content, no translation."""
    return _to_uint8(content)


def paste_example(content: Tensor, classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The baseline that answers with one of the K class images at random: perfect class, no content."""
    pick = torch.randint(len(classes), (len(content),), generator=generator)
    return _to_uint8(classes[pick.to(classes.device)])


def _to_uint8(x: Tensor) -> Tensor:
    """Exact inverse of `to_float`, so that baselines hand out the very pixels that they were given."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


# --- measures of pairs ---


def paired_l1(images: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference to the true translation, as a part of the full range: (N,), 0 is perfect."""
    return (images.float() - truth.float()).abs().mean((1, 2, 3)) / 255


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity: (N,), 1 is perfect. Wang et al. 2004, eq. 13,
    https://doi.org/10.1109/TIP.2003.819861.

    Gaussian window of 11 x 11 (sigma 1.5), K1 = 0.01, K2 = 0.03; mean over the places where the window fits,
    and over the channels.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ConfigError(
            f"SSIM's window of {WINDOW} does not fit images of {tuple(images.shape[-2:])}; use larger ones."
        )
    places = structural_similarity_index_measure(
        images.double(), truth.double(), data_range=255.0, reduction="none", return_full_image=True
    )[1]
    border = WINDOW // 2  # torchmetrics also places the window on a reflected border
    return places[..., border:-border, border:-border].mean((1, 2, 3)).float()


def dipd(a: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """Domain-invariant perceptual distance of two batches of feature maps (N, C, h, w): (N,), 0 is perfect.

    Maps are instance-normalized, which takes the style out, then compared by their mean squared difference.
    The paper takes conv5 of VGG of the content image and of its translation (MUNIT,
    https://arxiv.org/abs/1804.04732, section B.2).
    """
    a, b = F.instance_norm(a.float(), eps=eps), F.instance_norm(b.float(), eps=eps)
    return (a - b).square().mean((1, 2, 3))


# --- the protocol ---


@dataclass(frozen=True)
class TargetClassifier:
    """A classifier: `logits` of uint8 images are (N, number of its classes); `target[t]` is its number of
    target class t."""

    logits: Callable[[Tensor], Tensor]
    target: Sequence[int]


@dataclass(frozen=True)
class Measures:
    """What to measure.

    classifiers: by name, the paper's "all" (source and target classes) and "test" (target classes only).
    content_features: uint8 images -> feature maps (N, C, h, w), for DIPD.
    features, distance: uint8 images -> (N, D), and (features of all translations into a class, its name) ->
        distance to the real images of that class. The mean over classes is the paper's mFID if the features
        are Inception's; it is reported under `distance_name`.
    truth: (content number, class name) -> the true translation, uint8 (C, H, W).
    perceptual: two batches of uint8 images -> their distances (N,): LPIPS to the true translation, or where
        there is none to the content image.
    content_logits, content_label: a classifier of what the content images show, and the right answers (N,).
    """

    classifiers: dict[str, TargetClassifier] = field(default_factory=dict)
    content_features: Callable[[Tensor], Tensor] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    distance: Callable[[Tensor, str], float] | None = None
    distance_name: str = "mean_fd"
    truth: Callable[[int, str], Tensor] | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    content_logits: Callable[[Tensor], Tensor] | None = None
    content_label: Tensor | None = None


def translations(
    translate: Translator, contents: Tensor, examples: dict[str, Tensor], batch_size: int = 64
) -> Iterator[tuple[int, str, slice, Tensor]]:
    """Class by class, batch by batch: (class number and name, which contents, their translations)."""
    for t, (name, shown) in enumerate(examples.items()):
        classes = to_float(shown)
        for start in range(0, len(contents), batch_size):
            rows = slice(start, min(start + batch_size, len(contents)))
            yield t, name, rows, translate(to_float(contents[rows]), classes).cpu()


@torch.no_grad()
def evaluate(
    translate: Translator,
    contents: Tensor,
    examples: dict[str, Tensor],
    measures: Measures,
    batch_size: int = 64,
) -> dict[str, float]:
    """Means over all N x T translations of N contents (N, C, H, W) into T classes {name: (K, C, H, W)}.

    Names: "top1_<name>", "top5_<name>" (fractions; of fewer than 5 classes, of all), "is_<name>" (Inception
    score of the whole set with that classifier), "dipd", the distance's name, "l1", "ssim" and "lpips" to the
    true translations ("lpips_content" to the content where there are none), "content" (the
    fraction whose content the classifier still recognizes).
    """
    if not len(contents) or not examples:
        raise ConfigError(
            f"{len(contents)} content images and {len(examples)} target classes: nothing to evaluate."
        )
    totals, scores = _Means(), {name: _Scores(c) for name, c in measures.classifiers.items()}
    distances, features = [], []
    for t, name, rows, images in translations(translate, contents, examples, batch_size):
        for classifier_scores in scores.values():
            classifier_scores.add(images, t)
        if measures.content_features is not None:
            pair = measures.content_features(contents[rows]), measures.content_features(images)
            totals.add("dipd", dipd(*pair))
        if measures.content_logits is not None:
            read = measures.content_logits(images).argmax(1).cpu()
            assert measures.content_label is not None
            totals.add("content", read == measures.content_label[rows])
        truth = None
        if measures.truth is not None:
            truth = torch.stack([measures.truth(i, name) for i in range(rows.start, rows.stop)])
            totals.add("l1", paired_l1(images, truth))
            totals.add("ssim", ssim(images, truth))
        if measures.perceptual is not None:
            key, other = ("lpips_content", contents[rows]) if truth is None else ("lpips", truth)
            totals.add(key, measures.perceptual(images, other))
        if measures.features is not None:
            features.append(measures.features(images).cpu())
            if rows.stop == len(contents):
                assert measures.distance is not None
                distances.append(measures.distance(torch.cat(features), name))
                features = []
    results = {}
    for name, classifier_scores in scores.items():
        results |= {f"{key}_{name}": value for key, value in classifier_scores.results().items()}
    results |= totals.results()
    if distances:
        results[measures.distance_name] = sum(distances) / len(distances)
    return results


def sweep(
    translate: Translator,
    contents: Tensor,
    examples: dict[str, Tensor],
    measures: Measures,
    ks: Sequence[int] = (1, 5, 10, 15, 20),  # the paper's
    batch_size: int = 64,
) -> dict[int, dict[str, float]]:
    """`evaluate` with the first K of each class's images, for each K. Raises ConfigError if a class has too
    few."""
    fewest = min(examples, key=lambda name: len(examples[name]), default="")
    shown = len(examples.get(fewest, ()))
    wrong = [k for k in ks if k < 1 or (examples and k > shown)]
    if wrong:
        raise ConfigError(f"k={wrong[0]}: class {fewest!r} shows {shown} images; choose 1 to that many.")
    return {
        k: evaluate(
            translate, contents, {name: shown[:k] for name, shown in examples.items()}, measures, batch_size
        )
        for k in ks
    }


class _Means:
    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()
        self.counts[name] = self.counts.get(name, 0) + len(values)

    def results(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class _Scores:
    """Running accuracy and Inception score, exp(mean_x KL(p(y|x) || p(y))), of one classifier."""

    def __init__(self, classifier: TargetClassifier):
        self.classifier, self.means = classifier, _Means()
        self.probability = torch.zeros((), dtype=torch.float64)

    def add(self, images: Tensor, t: int) -> None:
        logits = self.classifier.logits(images).double().cpu()
        target = self.classifier.target[t]
        rank = (logits > logits[:, target : target + 1]).sum(1)  # classes that are preferred to the target
        for k in (1, 5):
            self.means.add(f"top{k}", rank < k)
        log_p = logits.log_softmax(1)
        self.means.add("negative_entropy", (log_p.exp() * log_p).sum(1))
        self.probability = self.probability + log_p.exp().sum(0)

    def results(self) -> dict[str, float]:
        means = self.means.results()
        marginal = self.probability / self.probability.sum()
        kl = means.pop("negative_entropy") - torch.special.xlogy(marginal, marginal).sum().item()
        return means | {"is": math.exp(kl)}
