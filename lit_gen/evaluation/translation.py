"""What a few-shot translator is worth: the protocol of FUNIT's paper, its baselines in the same table.

Liu et al. 2019, section 4 (https://arxiv.org/abs/1905.01723): source images are translated into every target
class, shown by K images that are the same for all methods; classifiers, feature networks and, where the data
know it, the true translation measure the results.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from lit_gen import __version__
from lit_gen.cli import claim, show, table
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.errors import ConfigError
from lit_gen.evaluation.classifiers import (
    ClassifierTraining,
    TrainedClassifier,
    all_images,
    evaluation_classifier,
    extractor_id,
    has_contents,
    weights_of,
)
from lit_gen.figures import class_codes, save, translation_sweep
from lit_gen.funit.classifier import Classifier, accuracy, load_classifier, predict
from lit_gen.funit.evaluation import (
    Measures,
    TargetClassifier,
    Translator,
    copy_content,
    evaluate,
    paste_example,
    sweep,
)
from lit_gen.funit.imagenet import VGG16Maps
from lit_gen.funit.module import FUNITModule
from lit_gen.funit.translator import Generator, adapted_code, class_code
from lit_gen.images import to_float
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Extractor, Moments, frechet_distance, moments
from lit_gen.metrics.restored import Perceptual
from lit_gen.models import content_augment, funit_run
from lit_gen.rng import keyed_generator
from lit_gen.runs import write_json
from lit_gen.score.translation import TranslationModule

TITLES = {
    "top1_all": "Top1-all",
    "top5_all": "Top5-all",
    "top1_test": "Top1-test",
    "top5_test": "Top5-test",
    "dipd": "DIPD",
    "is_all": "IS-all",
    "is_test": "IS-test",
    "l1": "L1",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "lpips_content": "LPIPS to the content",
    "content": "content",
}


def evaluate_translator(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Evaluates a run of FUNIT, or of a score model that translates, for each K of `cfg.k`; writes
    `evaluation.json`, `k_sweep.png` and `tsne.png`, prints the table and returns the record.

    `cfg.num` content images and the class images are drawn by `cfg.seed`. A target class with fewer images
    than the largest K is an error, or left out (`cfg.on_error="skip"`; None: as the run's data say). Raises
    ConfigError for a run of another kind.
    """
    ks = [int(k) for k in (cfg.k if isinstance(cfg.k, list | ListConfig) else [cfg.k])]
    if not ks or min(ks) < 1:
        raise ConfigError(f"k={ks}: give numbers of class images, such as [1,5,10,15,20].")
    claim(out, "an evaluation", "evaluation.json")
    module, run_cfg, path = funit_run(cfg)
    data = instantiate(run_cfg.data)
    if cfg.num < 2:
        raise ConfigError(f"num={cfg.num}: give at least 2 content images.")
    task = TranslationTask.of(data, cfg.num, max(ks), cfg.seed, cfg.seed, cfg.on_error)
    device = module.device
    classifiers = evaluation_classifiers(
        data, classifier_training(run_cfg), dict(cfg.classifiers), device, cfg.inception
    )
    measures, names = _measures(cfg, task, classifiers, device)
    paste = partial(paste_example, generator=keyed_generator(cfg.seed, "paste"))
    rows = {
        name: evaluate(baseline, task.contents, task.examples, measures, cfg.batch_size)
        for name, baseline in {"copying": copy_content, "pasting": paste}.items()
    }
    found = sweep(
        _translator(module, cfg.adapt, content_augment(run_cfg)),
        task.contents,
        task.examples,
        measures,
        ks,
        cfg.batch_size,
    )
    rows |= {f"K = {k}": numbers for k, numbers in found.items()}
    record = {
        "checkpoint": str(path),
        "weights": "average" if cfg.ema else "raw",
        "contents": cfg.num,
        "target_classes": len(task.examples),
        "left_out": task.left_out,
        "k": ks,
        "adapt": cfg.adapt,
        "guidance": None if cfg.guidance is None else str(cfg.guidance),
        "seed": cfg.seed,
        "classifiers": {
            n: {"id": str(extractor_id(v, n)), "accuracy": v.accuracy} for n, v in classifiers.items()
        },
        "names": names,
        "results": rows,
        "versions": {"lit_gen": __version__, "torch": torch.__version__},
    }
    write_json(out / "evaluation.json", record)
    save(translation_sweep(_over_k(rows, names), ks), out / "k_sweep.png")
    save(class_codes(_places_of_codes(module.generator_ema, data)), out / "tsne.png")
    _print(record, out)
    return record


@dataclass(frozen=True)
class TranslationTask:
    """Content images, by their numbers in `data.train` and in pixels, what they show where that is known, and
    K images of every target class; `left_out`: classes with fewer, and how many they have."""

    data: FewShotDataModule
    index: Tensor
    contents: Tensor
    content_label: Tensor | None
    examples: dict[str, Tensor]
    left_out: dict[str, int]

    @classmethod
    def of(
        cls,
        data: FewShotDataModule,
        num: int,
        k: int,
        seed: int,
        example_seed: int | None = None,
        on_error: str | None = None,
    ) -> "TranslationTask":
        """`num` contents drawn by `seed`, and K images of each class by `example_seed` (None: the data's)."""
        examples, left_out = data.examples(k, on_error, example_seed)
        index = data.contents(num, seed)
        items = [data.train[int(i)] for i in index]
        label = torch.tensor([item["content"] for item in items]) if has_contents(data) else None
        contents = torch.stack([item["image"] for item in items])
        return cls(data, index, contents, label, examples, left_out)

    @property
    def places(self) -> list[int]:
        """The numbers of the target classes among those of the test split."""
        return [self.data.test.classes.index(name) for name in self.examples]

    def truth(self) -> Callable[[int, str], Tensor] | None:
        """(number of the content, class) -> the true translation; None where the data do not know it."""
        if self.data.truth(int(self.index[0]), next(iter(self.examples))) is None:
            return None

        # One is known of every image or of none.
        return lambda i, name: cast(Tensor, self.data.truth(int(self.index[i]), name))

    def part(self, rank: int, ranks: int) -> "TranslationTask":
        """A rank's share of the contents."""
        rows = slice(rank, None, ranks)
        label = None if self.content_label is None else self.content_label[rows]
        return replace(self, index=self.index[rows], contents=self.contents[rows], content_label=label)


def classifier_training(run_cfg: DictConfig) -> ClassifierTraining:
    """How the run's own classifiers were trained, or the default."""
    node = run_cfg.metrics.classifiers
    return instantiate(node) if node else ClassifierTraining()


def evaluation_classifiers(
    data: FewShotDataModule,
    training: ClassifierTraining,
    files: dict[str, str],
    device: torch.device | str = "cpu",
    inception: str | None = None,
) -> dict[str, TrainedClassifier]:
    """The classifiers "test", "all" and, where the data know contents, "content", on a device: from `files`
    {kind: path}, from the cache, or trained; with `inception`, torchvision's weights (a file or "auto"), the
    first two are fine-tuned from it.

    Raises ConfigError for a file whose classes are not those of the data.
    """
    kinds = ["test", "all", *(["content"] if has_contents(data) else [])]
    if unknown := set(files) - set(kinds):
        raise ConfigError(f"classifiers.{min(unknown)}: these data have the classifiers {', '.join(kinds)}.")
    start = None if inception is None else weights_of("inception", inception)
    classifiers = {}
    for kind in kinds:
        if kind in files:
            classifiers[kind] = _read(data, kind, files[kind], device)
        else:
            begin = None if kind == "content" else start
            classifiers[kind] = evaluation_classifier(data, kind, training, inception=begin, device=device)
    return classifiers


def _read(data: FewShotDataModule, kind: str, path: str, device: torch.device | str) -> TrainedClassifier:
    network, classes, _ = load_classifier(path)
    network.to(device)
    wanted = {"test": data.test.classes, "all": data.classes}.get(kind, classes)
    if classes != wanted:
        raise ConfigError(
            f"classifiers.{kind}={path} has {len(classes)} other classes than the data's {len(wanted)}."
        )
    images, labels = all_images(data.test, "content" if kind == "content" else "label")
    if kind == "all":
        labels = labels + len(data.train.classes)
    return TrainedClassifier(network.requires_grad_(False), classes, accuracy(network, images, labels))


def _translator(module: FUNITModule | TranslationModule, adapt: int, augment: Any) -> Translator:
    """The module's translations; with `adapt` steps of adaptation of each class's code, once a class."""
    if not adapt:
        return module.translate
    code = lru_cache(1)(lambda classes: adapted_code(module.generator_ema, classes, adapt, augment))
    return lambda content, classes: module.translate(content, code(classes))


def _measures(
    cfg: DictConfig,
    task: TranslationTask,
    classifiers: dict[str, TrainedClassifier],
    device: torch.device,
) -> tuple[Measures, dict[str, str]]:
    """All that can be measured, and by which networks."""
    data, places = task.data, task.places
    maps, maps_name = _content_maps(classifiers, cfg.vgg, device)
    perceptual, lpips_name = _perceptual(cfg.lpips, task.contents.shape[-1])
    sources = len(data.train.classes)
    panel = {
        "test": TargetClassifier(partial(predict, classifiers["test"].network), places),
        "all": TargetClassifier(partial(predict, classifiers["all"].network), [sources + p for p in places]),
    }
    if cfg.extractor:
        extractor = instantiate(cfg.extractor)
    else:
        pooled, channels = _Pooled(classifiers["all"].network), data.train[0]["image"].shape[0]
        extractor = Extractor(extractor_id(classifiers["all"], "all"), pooled, channels)
    features = lambda images: extractor(images.to(device)).cpu()  # noqa: E731
    real = {name: _moments(data, features, place) for name, place in zip(task.examples, places, strict=True)}
    distance_name = "m" + extractor.id.key("fd", len(task.contents))
    measures = Measures(
        classifiers=panel,
        content_features=maps,
        features=features,
        distance=lambda found, name: frechet_distance(real[name], moments(found)),
        distance_name=distance_name,
        truth=task.truth(),
        perceptual=perceptual,
        content_logits=partial(predict, classifiers["content"].network) if "content" in classifiers else None,
        content_label=task.content_label,
    )
    return measures, {"dipd": maps_name, "lpips": lpips_name, distance_name: str(extractor.id)}


def _content_maps(
    classifiers: dict[str, TrainedClassifier], vgg: str | None, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], str]:
    """What DIPD compares, and of which network: VGG's maps, or else those of the classifier of contents,
    or of all classes."""
    if vgg is not None:
        path = weights_of("vgg", vgg)
        network = VGG16Maps(path).to(device)
        return network, f"VGG-16, relu5_3 ({path.name})"
    kind = "content" if "content" in classifiers else "all"
    return torch.no_grad()(classifiers[kind].network.maps), str(extractor_id(classifiers[kind], kind))


def _perceptual(given: str | None, image_size: int) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """LPIPS, and its weights or why it is left out."""
    found = Perceptual(given and str(weights_of("lpips", given)), image_size)
    if found.metric is None:
        return None, found.name
    return (lambda a, b: torch.full((len(a),), found(a, b)["lpips"])), found.name


class _Pooled(torch.nn.Module):
    """A classifier as an extractor calls it: float images in [0, 255] -> (features, logits)."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(images)
        return features, self.network.head(features)


def _moments(data: FewShotDataModule, features: Callable[[Tensor], Tensor], label: int) -> Moments:
    """Of the features of all real images of a target class."""
    images = torch.stack([data.test[int(i)]["image"] for i in data.test.of_class(label)])
    return moments(torch.cat([features(batch) for batch in images.split(256)]))


def _distance_name(names: dict[str, str]) -> str:
    return next(name for name in names if name not in ("dipd", "lpips"))


def _over_k(rows: dict[str, dict[str, float]], names: dict[str, str]) -> dict[str, dict[str, float]]:
    """What the figure over K shows: title -> {method: value}."""
    distance = _distance_name(names)
    shown = [n for n in ("top1_test", "top1_all", distance, "dipd", "l1", "content") if n in rows["copying"]]
    return {
        TITLES.get(name, "mean Frechet distance"): {method: row[name] for method, row in rows.items()}
        for name in shown
    }


def _places_of_codes(generator: Generator, data: FewShotDataModule, most: int = 20) -> dict[str, np.ndarray]:
    """t-SNE (van der Maaten & Hinton 2008) of the codes of single images of the target classes, up to `most`
    of each: class -> (n, 2)."""
    from sklearn.manifold import TSNE

    chosen = [data.test.of_class(c)[:most] for c in range(len(data.test.classes))]
    images = torch.stack([data.test[int(i)]["image"] for i in torch.cat(chosen)])
    codes = torch.cat([class_code(generator, to_float(batch)[:, None]).cpu() for batch in images.split(64)])
    places = TSNE(perplexity=min(30.0, (len(codes) - 1) / 3), random_state=0).fit_transform(codes.numpy())
    ends = np.cumsum([len(members) for members in chosen])[:-1]
    return dict(zip(data.test.classes, np.split(places, ends), strict=True))


def _print(record: dict[str, Any], out: Path) -> None:
    distance = _distance_name(record["names"])
    title = f"{record['contents']} contents into {record['target_classes']} unseen classes"
    results, mean = record["results"], "mFID" if distance.startswith("mfid") else "mFD"
    rows = [
        [TITLES.get(name, mean), *(f"{numbers[name]:.3f}" for numbers in results.values())]
        for name in [*TITLES, distance]
        if name in results["copying"]
    ]
    names, lines = record["names"], []
    for kind, classifier in record["classifiers"].items():
        accuracy = f"{100 * classifier['accuracy']:.1f} % accuracy on held-out images"
        lines.append(f"classifier {kind}: {classifier['id']}, {accuracy}")
    lines += [f"DIPD: {names['dipd']}", f"LPIPS: {names['lpips']}", f"{distance}: {names[distance]}"]
    if record["left_out"]:
        few = ", ".join(f"{name} ({n} images)" for name, n in record["left_out"].items())
        lines.append(f"left out for fewer than {max(record['k'])} images: {few}")
    show(table(title, ["", *results], rows), *lines, f"written to {out}")
