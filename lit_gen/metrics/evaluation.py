"""All metrics of a set of images from one pass over it, the same for any division of the images into batches
and ranks.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_gen.errors import ConfigError
from lit_gen.metrics.copying import ENOUGH, copying
from lit_gen.metrics.distributed import all_gather, all_reduce_sum, from_rank_zero, world_size
from lit_gen.metrics.extractors import Extractor, ExtractorId
from lit_gen.metrics.fls import feature_likelihood
from lit_gen.metrics.frechet import FeatureStatistics
from lit_gen.metrics.functional import (
    Estimate,
    Moments,
    frechet_estimate,
    frechet_infinity,
    inception_score,
)
from lit_gen.metrics.kernels import cmmd, kernel_distance
from lit_gen.metrics.neighbours import authenticity, precision_recall_density_coverage
from lit_gen.metrics.vendi import vendi_score

__all__ = [
    "METRICS",
    "NEED_TRAINING",
    "Evaluation",
    "Predictions",
    "Summary",
    "check_metrics",
    "check_possible",
    "compare",
]

METRICS = (
    "fd", "fdtrain", "fdinf", "kd", "cmmd", "precision", "recall", "density", "coverage", "is", "vendi",
    "authpct", "ct", "fls", "fdclass",
)  # fmt: skip
"""What `compare` can compute, by the first part of the metrics' names."""
NEED_TRAINING = {"fdtrain", "authpct", "ct", "fls"}
"""Those that need the training images."""
WHEN_CHOSEN = {"fls"}
"""Those that are slow, and computed only where they are chosen by name."""

NEIGHBORS = ("precision", "recall", "density", "coverage")
ABSENT = torch.iinfo(torch.int64).max
CLASSES = 1024  # of a classifier, at most


@dataclass
class Summary:
    """What is kept of a set of n images: exact moments, and a random part of it with its features.

    `index` (m,), `features` (m, d), `logits` (m, outputs) and `label` (m,) are of the m images that a seeded
    hash of the index chose, in the hash's order, which is a random one; m is n if all of them are stored.
    `classes` holds the moments of every class, None for one with fewer than 2 images.
    """

    id: ExtractorId
    moments: Moments
    index: Tensor
    features: Tensor
    logits: Tensor | None = None
    label: Tensor | None = None
    classes: list[Moments | None] | None = None

    @property
    def n(self) -> int:
        return self.moments.n

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the extractor's id, to be stored."""
        rows = {name: getattr(self, name) for name in ("index", "features", "logits", "label")}
        packed = {name: value for name, value in rows.items() if value is not None} | self.moments.tensors()
        for c, part in enumerate(self.classes or []):
            stored = part.tensors() if part else {"n": torch.tensor(0)}
            packed |= {f"class{c}.{name}": value for name, value in stored.items()}
        return packed

    @classmethod
    def from_tensors(cls, id: ExtractorId, packed: dict[str, Tensor]) -> "Summary":
        """The inverse of `tensors`."""
        classes = []
        while (prefix := f"class{len(classes)}.") + "n" in packed:
            part = {name.removeprefix(prefix): x for name, x in packed.items() if name.startswith(prefix)}
            classes.append(Moments.from_tensors(part) if int(part["n"]) else None)
        optional = {"logits": packed.get("logits"), "label": packed.get("label")}
        rows = (packed["index"], packed["features"])
        return cls(id, Moments.from_tensors(packed), *rows, **optional, classes=classes or None)


class Evaluation:
    """Feeds images through an extractor once; `summary()` gives what all metrics need.

    The features of at most `max_stored_features` images are kept (float32; 10,000 x 2048 are 82 MB);
    `num_classes` asks for moments per class.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        max_stored_features: int = 10_000,
        num_classes: int | None = None,
        seed: int = 0,
    ):
        if max_stored_features < 2:
            raise ConfigError(f"max_stored_features={max_stored_features} must keep at least 2 images.")
        self.extractor, self.seed = extractor, seed
        d = extractor.id.d
        self.statistics = FeatureStatistics(d)
        self.classes = [FeatureStatistics(d) for _ in range(num_classes or 0)]
        self.index = torch.zeros(max_stored_features, dtype=torch.int64)
        self.priority = torch.full((max_stored_features,), ABSENT)
        self.features = torch.zeros(max_stored_features, d)
        self.label = torch.zeros(max_stored_features, dtype=torch.int64)
        self.logits: Tensor | None = None

    def update(self, images: Tensor, index: Tensor, label: Tensor | None = None) -> None:
        """uint8 (B, C, H, W); `index` (B,) is the image's number in the whole set, `label` (B,) its class.
        Raises ConfigError for images without an index, or without a label that is needed."""
        if index.shape != (len(images),):
            raise ConfigError(f"{len(images)} images need an index each, got shape {tuple(index.shape)}.")
        features, logits = self.extractor.with_logits(images)
        self.statistics.to(features.device).update(features)
        rows = {"index": index.cpu(), "features": features.cpu()}
        rows |= {} if logits is None else {"logits": logits.cpu()}
        if self.classes:
            if label is None or label.shape != index.shape:
                raise ConfigError(f"num_classes={len(self.classes)} needs a label for each image.")
            for c, statistics in enumerate(self.classes):
                statistics.to(features.device).update(features[label.to(features.device) == c])
            rows["label"] = label.cpu()
        self._keep(rows)

    def summary(self) -> Summary:
        """Of the images of all ranks, on every rank; every rank must call. Raises ConfigError where an
        image was given twice."""
        whole = self.statistics.compute()
        gathered = all_gather(self.priority)
        chosen = gathered.flatten().sort().values[: len(self.priority)]
        chosen = chosen[chosen != ABSENT]
        if bool((chosen.diff() == 0).any()):
            raise ConfigError(
                "An image index was given twice. A sampler that pads the last batch or rank repeats images, "
                "and biases every metric: use one that does not (Lightning's UnrepeatedDistributedSampler), "
                "and number the images of all ranks together."
            )
        place = torch.searchsorted(chosen, self.priority).clamp(max=len(chosen) - 1)
        own = (self.priority == chosen[place]).nonzero().flatten()

        def collect(rows: Tensor) -> Tensor:
            # Every row is one rank's and zero elsewhere, so the sum over ranks is that row, exactly.
            out = rows.new_zeros(len(chosen), *rows.shape[1:])
            out[place[own]] = rows[own]
            return all_reduce_sum(out)[0] if world_size() > 1 else out

        logits = self._logits_everywhere()
        return Summary(
            id=self.extractor.id,
            moments=whole,
            index=collect(self.index),
            features=collect(self.features),
            logits=None if logits is None else collect(logits),
            label=collect(self.label) if self.classes else None,
            classes=self._class_moments() if self.classes else None,
        )

    def _class_moments(self) -> list[Moments | None]:
        counts = torch.stack([statistics.n.cpu() for statistics in self.classes])
        counts = all_gather(counts).sum(0)
        return [s.compute() if n >= 2 else None for s, n in zip(self.classes, counts.tolist(), strict=True)]

    def _logits_everywhere(self) -> Tensor | None:
        """A rank without images does not know whether its network has a head, nor how wide."""
        width = 0 if self.logits is None else self.logits.shape[1]
        width = int(all_gather(torch.tensor(width)).max())
        if self.logits is None and width:
            self.logits = torch.zeros(len(self.index), width)
        return self.logits

    def _keep(self, rows: dict[str, Tensor]) -> None:
        """Keeps the rows whose priorities are among the smallest so far, in the slots of those that no longer
        are.
        """
        if self.logits is None and "logits" in rows:
            self.logits = torch.zeros(len(self.index), rows["logits"].shape[1])
        rows["priority"] = _priority(rows["index"], self.seed)
        size = len(self.index)
        smallest = torch.cat([self.priority, rows["priority"]]).topk(size, largest=False).indices
        new = smallest[smallest >= size] - size
        free = torch.ones(size, dtype=torch.bool)
        free[smallest[smallest < size]] = False
        for name, values in rows.items():
            kept = getattr(self, name)
            kept[free] = values[new].to(kept.dtype)


class Predictions:
    """The classes that a classifier of at most 1,024 classes predicts for a set of images: how many images of
    each are predicted with p > 0.9 and, of `labeled` images, how many are predicted as their own class."""

    def __init__(self, classifier: Extractor, labeled: bool = False):
        self.classifier, self.labeled = classifier, labeled
        self.confident = torch.zeros(CLASSES + 1, dtype=torch.int64)  # the last: images of no confident class
        self.right = torch.zeros((), dtype=torch.int64)

    def update(self, images: Tensor, label: Tensor | None = None) -> None:
        """uint8 (B, C, H, W) and, if they have one, their class (B,). Nothing waits for a GPU."""
        logits = self.classifier.with_logits(images)[1]
        assert logits is not None  # of a classifier
        p, predicted = logits.softmax(1).max(1)
        self.confident, self.right = self.confident.to(p.device), self.right.to(p.device)
        self.confident.index_add_(0, predicted.where(p > 0.9, CLASSES), torch.ones_like(predicted))
        if label is not None:
            self.right += (predicted == label.to(p.device)).sum()

    def fractions(self, n: int) -> dict[str, Any]:
        """Of the n images of all ranks: `confident_fraction`, `classes_found` among the confident ones and
        `class_accuracy`, the fraction predicted as their own class. Every rank must call."""
        confident, right = all_gather(self.confident).sum(0)[:CLASSES], all_gather(self.right).sum()
        found = {"confident_fraction": int(confident.sum()) / n, "classes_found": int((confident > 0).sum())}
        return found | ({"class_accuracy": int(right) / n} if self.labeled else {})


def check_metrics(names: Collection[str]) -> None:
    """Raises ConfigError for a name that is none of `METRICS`."""
    if unknown := [name for name in names if name not in METRICS]:
        raise ConfigError(f"There is no metric {unknown[0]!r}: choose among {', '.join(METRICS)}.")


def compare(
    reference: Summary | Moments,
    generated: Summary,
    *,
    training: Summary | None = None,
    k: int = 5,
    only: Collection[str] = (),
) -> dict[str, Estimate]:
    """Every metric that the summaries allow, under its full name (`ExtractorId.key`), with its standard
    error.

    `fd` Frechet distance, `fdinf` FID-infinity (from 4 d images on), `kd` unbiased kernel distance, `cmmd`
    for CLIP's features, `precision`, `recall`, `density`, `coverage`, `is` Inception Score (if the network
    has a head), `vendi` Vendi score, `fdclass` the mean over classes of the distances within each, and
    `fdclass<c>`; with `training`, `fdtrain` the Frechet distance to that set, `authpct` against it, `ct` C_T
    (from 61 images on), and, only where it is chosen, `fls` the feature likelihood score, its Gaussians
    fitted to one half of the training images and its baseline the other. Of a reference whose moments alone
    are known: fd, fdtrain, fdinf, is, vendi, and authpct. `only` chooses among them (`METRICS`); one chosen
    that the summaries do not allow is a ConfigError. The names' n counts the generated images that the metric
    saw. Computed on rank 0, the same numbers everywhere.
    """
    check_metrics(only)
    ids = [s.id for s in (reference, training) if isinstance(s, Summary)]
    if any(id != generated.id for id in ids):
        raise ConfigError(f"Features of {ids[0]} and of {generated.id} cannot be compared.")
    return from_rank_zero(lambda: _compare(reference, generated, training, k, only))


def _compare(
    reference: Summary | Moments,
    generated: Summary,
    training: Summary | None,
    k: int,
    only: Collection[str],
) -> dict[str, Estimate]:
    moments = reference if isinstance(reference, Moments) else reference.moments
    real = None if isinstance(reference, Moments) else reference.features
    classes = None if isinstance(reference, Moments) else reference.classes
    fake, n, m, key = generated.features, generated.n, len(generated.features), generated.id.key
    absent = _absent(generated.id, m, generated.logits is not None, real, training, k)
    absent["fdclass"] = not (classes and generated.classes) and "both sets in the same classes"
    _refuse(only, absent)
    wanted = [
        name for name in METRICS if not absent.get(name) and name in (only or set(METRICS) - WHEN_CHOSEN)
    ]
    results = {}
    if "fd" in wanted:
        results[key("fd", n)] = frechet_estimate(moments, generated.moments, fake)
    if "fdtrain" in wanted and training is not None:
        results[key("fdtrain", n)] = frechet_estimate(training.moments, generated.moments, fake)
    if "fdinf" in wanted:
        results[key("fdinf", m)] = frechet_infinity(moments, fake)
    if real is not None:
        if "kd" in wanted:
            results[key("kd", m)] = kernel_distance(real, fake)
        if "cmmd" in wanted:
            results[key("cmmd", m)] = cmmd(normalize(real), normalize(fake))
        if neighbours := set(NEIGHBORS) & set(wanted):
            for name, estimate in precision_recall_density_coverage(real, fake, k).items():
                if name in neighbours:
                    results[key(name, m)] = estimate
    if "is" in wanted and generated.logits is not None:
        results[key("is", m)] = inception_score(generated.logits)
    if "vendi" in wanted:
        results[key("vendi", m)] = vendi_score(fake)
    if "authpct" in wanted and training is not None:
        results[key("authpct", m)] = authenticity(training.features, fake)
    if "ct" in wanted and training is not None and real is not None:
        results[key("ct", m)] = copying(training.features, real, fake)
    if "fls" in wanted and training is not None and real is not None:
        half = len(training.features) // 2  # their order is a random one
        centers = min(half, m)  # as many Gaussians on both sides: more of them score higher
        fitted, baseline = training.features[:half], training.features[half : half + centers]
        score = feature_likelihood(fitted, baseline, real, fake[:centers]).score
        results[key("fls", centers)] = Estimate(score, None)
    if "fdclass" in wanted and classes and generated.classes:
        results |= _by_class(classes, generated.classes, generated)
    return results


def check_possible(
    metrics: Collection[str], reference: Summary, m: int, *, training: Summary | None = None, k: int = 5
) -> None:
    """Raises ConfigError for metrics that `compare` would refuse of m generated images whose features are
    kept."""
    head = reference.logits is not None
    _refuse(metrics, _absent(reference.id, m, head, reference.features, training, k))


def _refuse(names: Collection[str], absent: dict[str, str | bool]) -> None:
    for name in names:
        if why := absent.get(name):
            raise ConfigError(f"{name} needs {why}.")


def _absent(
    id: ExtractorId, m: int, head: bool, real: Tensor | None, training: Summary | None, k: int
) -> dict[str, str | bool]:
    """What the metrics of m generated images lack that cannot be computed, False for those that can; others
    are not in it."""
    images = "the reference's images, not their statistics alone"
    few = 0 if real is None else min(len(real), m)
    fewest = 0 if training is None else min(few, len(training.features))
    reference = dict.fromkeys(("kd", "cmmd", *NEIGHBORS, "ct", "fls"), images) if real is None else {}
    known = dict.fromkeys(NEED_TRAINING, "the training images") if training is None else {}
    return {
        "fdinf": m < 4 * id.d and f"{4 * id.d} generated images, there are {m}",
        "cmmd": not id.name.startswith("clip-") and "CLIP's features",
        **dict.fromkeys(NEIGHBORS, few <= k and f"more than k={k} images in both sets, there are {few}"),
        "is": not head and "a network with a head",
        "ct": fewest <= ENOUGH and f"more than {ENOUGH} images in each set, there are {fewest}",
        "fls": fewest < 4 and f"at least 4 images in each set, there are {fewest}",
        **reference,
        **known,
    }


def _by_class(
    reals: list[Moments | None], fakes: list[Moments | None], generated: Summary
) -> dict[str, Estimate]:
    """The distance within each class, and their mean; NaN where a class has fewer than 2 images."""
    key, estimates = generated.id.key, {}
    for c, (real, fake) in enumerate(zip(reals, fakes, strict=True)):
        part = generated.features[generated.label == c]
        if real is None or fake is None or len(part) < 2:
            estimates[key(f"fdclass{c}", 0 if fake is None else fake.n)] = Estimate(float("nan"), None)
        else:
            estimates[key(f"fdclass{c}", fake.n)] = frechet_estimate(real, fake, part)
    values = [estimate.value for estimate in estimates.values()]
    errors = [estimate.se for estimate in estimates.values() if estimate.se is not None]
    se = float(np.linalg.norm(errors)) / len(errors) if len(errors) == len(values) else None
    return {key("fdclass", generated.n): Estimate(float(np.mean(values)), se)} | estimates


def _priority(index: Tensor, seed: int) -> Tensor:
    """A hash of (seed, index) as a number in [0, 2^63): splitmix64's finaliser, a bijection but for the last
    bit.
    """
    z = index.numpy().astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))
