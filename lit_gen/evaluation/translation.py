"""What a few-shot translator is worth: the protocol of FUNIT's paper, its baselines in the same table.

Liu et al. 2019, section 4 (https://arxiv.org/abs/1905.01723): source images are translated into every target
class, shown by K images that are the same for all methods; classifiers, feature networks and, where the data
know it, the true translation measure the results.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_gen import __version__
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
from lit_gen.funit.classifier import Classifier, accuracy, load_classifier, predict
from lit_gen.funit.evaluation import Measures, TargetClassifier, copy_content, evaluate, paste_example, sweep
from lit_gen.funit.imagenet import VGG16Maps
from lit_gen.funit.networks import FewShotGenerator
from lit_gen.funit.translator import class_code
from lit_gen.images import to_float
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Extractor, FeatureStatistics, frechet_distance
from lit_gen.metrics.restored import Perceptual
from lit_gen.models import funit_run
from lit_gen.rng import keyed_generator

__all__ = ["classifier_training", "evaluate_translator", "evaluation_classifiers"]

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
    """Evaluates a FUNIT run for each K of `cfg.k`; writes `evaluation.json`, `k_sweep.png` and `tsne.png`,
    prints the table and returns the record.

    `cfg.num` content images and the class images are drawn by `cfg.seed`. A target class with fewer images
    than the largest K is an error, or left out (`cfg.on_error="skip"`; None: as the run's data say). Raises
    ConfigError for a run of another kind.
    """
    ks = [int(k) for k in (cfg.k if isinstance(cfg.k, list | ListConfig) else [cfg.k])]
    if not ks or min(ks) < 1:
        raise ConfigError(f"k={ks}: give numbers of class images, such as [1,5,10,15,20].")
    if (out / "evaluation.json").exists():
        raise ConfigError(f"{out} already holds an evaluation: choose another out=.")
    module, run_cfg, path = funit_run(cfg)
    data = instantiate(run_cfg.data)
    if cfg.num < 2:
        raise ConfigError(f"num={cfg.num}: give at least 2 content images.")
    test = _Test.of(data, cfg.num, max(ks), cfg.seed, cfg.on_error)
    device = module.device
    classifiers = evaluation_classifiers(
        data, classifier_training(run_cfg), dict(cfg.classifiers), device, cfg.inception
    )
    measures, names = _measures(cfg, data, test, classifiers, device)
    rows = {"copying": evaluate(copy_content, test.contents, test.examples, measures, cfg.batch_size)}
    paste = partial(paste_example, generator=keyed_generator(cfg.seed, "paste"))
    rows["pasting"] = evaluate(paste, test.contents, test.examples, measures, cfg.batch_size)
    found = sweep(module.translate, test.contents, test.examples, measures, ks, cfg.batch_size)
    rows |= {f"K = {k}": numbers for k, numbers in found.items()}
    record = {
        "checkpoint": str(path),
        "weights": "average" if cfg.ema else "raw",
        "contents": cfg.num,
        "target_classes": len(test.examples),
        "left_out": test.left_out,
        "k": ks,
        "seed": cfg.seed,
        "classifiers": {
            n: {"id": str(extractor_id(v, n)), "accuracy": v.accuracy} for n, v in classifiers.items()
        },
        "names": names,
        "results": rows,
        "versions": {"lit_gen": __version__, "torch": torch.__version__},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    _plot_sweep(rows, ks, names, out / "k_sweep.png")
    _plot_codes(module.generator_ema, data, out / "tsne.png")
    _print(record, out)
    return record


@dataclass(frozen=True)
class _Test:
    """The content images, by number and in pixels, and the images of every target class."""

    index: Tensor
    contents: Tensor
    content_label: Tensor | None
    examples: dict[str, Tensor]
    left_out: dict[str, int]

    @classmethod
    def of(cls, data: FewShotDataModule, num: int, k: int, seed: int, on_error: str | None) -> "_Test":
        examples, left_out = data.examples(k, on_error, seed)
        index = data.contents(num, seed)
        items = [data.train[int(i)] for i in index]
        label = torch.tensor([item["content"] for item in items]) if has_contents(data) else None
        return cls(index, torch.stack([item["image"] for item in items]), label, examples, left_out)


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


def _measures(
    cfg: DictConfig,
    data: FewShotDataModule,
    test: _Test,
    classifiers: dict[str, TrainedClassifier],
    device: torch.device,
) -> tuple[Measures, dict[str, str]]:
    """All that can be measured, and by which networks."""
    maps, maps_name = _content_maps(classifiers, cfg.vgg, device)
    perceptual, lpips_name = _perceptual(cfg.lpips, test.contents.shape[-1])
    sources = len(data.train.classes)
    places = [data.test.classes.index(name) for name in test.examples]
    panel = {
        "test": TargetClassifier(partial(predict, classifiers["test"].network), places),
        "all": TargetClassifier(partial(predict, classifiers["all"].network), [sources + p for p in places]),
    }
    extractor = (
        instantiate(cfg.extractor)
        if cfg.extractor
        else Extractor(
            extractor_id(classifiers["all"], "all"),
            _Pooled(classifiers["all"].network),
            data.train[0]["image"].shape[0],
        )
    )
    features = lambda images: extractor(images.to(device)).cpu()  # noqa: E731
    real = {name: _moments(data, features, place) for name, place in zip(test.examples, places, strict=True)}
    distance_name = "m" + extractor.id.key("fd", len(test.contents))

    def truth(i: int, name: str) -> Tensor:
        translation = data.truth(int(test.index[i]), name)
        assert translation is not None  # where one is known all are
        return translation

    knows = data.truth(int(test.index[0]), next(iter(test.examples))) is not None
    measures = Measures(
        classifiers=panel,
        content_features=maps,
        features=features,
        distance=lambda found, name: frechet_distance(real[name], _counted(found)),
        distance_name=distance_name,
        truth=truth if knows else None,
        perceptual=perceptual,
        content_logits=partial(predict, classifiers["content"].network) if "content" in classifiers else None,
        content_label=test.content_label,
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
    return partial(_maps, classifiers[kind].network), str(extractor_id(classifiers[kind], kind))


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


@torch.no_grad()
def _maps(network: Classifier, images: Tensor) -> Tensor:
    return network.maps(images)


def _moments(data: FewShotDataModule, features: Callable[[Tensor], Tensor], label: int) -> Any:
    """Of the features of all real images of a target class."""
    images = torch.stack([data.test[int(i)]["image"] for i in data.test.of_class(label)])
    return _counted(torch.cat([features(batch) for batch in images.split(256)]))


def _counted(features: Tensor) -> Any:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.compute()


def _distance_name(names: dict[str, str]) -> str:
    return next(name for name in names if name not in ("dipd", "lpips"))


def _plot_sweep(
    rows: dict[str, dict[str, float]], ks: Sequence[int], names: dict[str, str], path: Path
) -> None:
    """Each measure over K, with the baselines as lines."""
    from matplotlib.figure import Figure

    distance = _distance_name(names)
    shown = [n for n in ("top1_test", "top1_all", distance, "dipd", "l1", "content") if n in rows["copying"]]
    columns = -(-len(shown) // 2)
    figure = Figure(figsize=(3 * columns, 5), layout="constrained")
    axes = figure.subplots(2, columns).flatten()
    for spare in axes[len(shown) :]:
        spare.remove()
    for axis, name in zip(axes, shown, strict=False):
        axis.plot(ks, [rows[f"K = {k}"][name] for k in ks], marker="o", markersize=3, label="FUNIT")
        for baseline, style in (("copying", ":"), ("pasting", "--")):
            axis.axhline(rows[baseline][name], color="gray", linestyle=style, linewidth=1, label=baseline)
        axis.set(title=TITLES.get(name, "mean Frechet distance"), xlabel="K", xticks=ks)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _plot_codes(generator: FewShotGenerator, data: FewShotDataModule, path: Path, most: int = 20) -> None:
    """t-SNE (van der Maaten & Hinton 2008) of the codes of single images of the target classes, up to `most`
    of each."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    chosen = [data.test.of_class(c)[:most] for c in range(len(data.test.classes))]
    images = torch.stack([data.test[int(i)]["image"] for i in torch.cat(chosen)])
    codes = torch.cat([class_code(generator, to_float(batch)[:, None]).cpu() for batch in images.split(64)])
    places = TSNE(perplexity=min(30.0, (len(codes) - 1) / 3), random_state=0).fit_transform(codes.numpy())
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis, start = figure.subplots(), 0
    for c, members in enumerate(chosen):
        part = places[start : start + len(members)]
        start += len(members)
        marker = "osv^"[c // 10 % 4]
        axis.scatter(*part.T, s=10, marker=marker, color=f"C{c % 10}", label=data.test.classes[c])
    axis.set(xticks=[], yticks=[], title="class codes of single images (t-SNE)")
    figure.legend(loc="outside right upper", fontsize=6)
    figure.savefig(path, dpi=120)


def _print(record: dict[str, Any], out: Path) -> None:
    distance = _distance_name(record["names"])
    table = Table(title=f"{record['contents']} contents into {record['target_classes']} unseen classes")
    table.add_column("")
    for method in record["results"]:
        table.add_column(method, justify="right")
    for name in [*TITLES, distance]:
        if name in record["results"]["copying"]:
            title = TITLES.get(name, "mFID" if distance.startswith("mfid") else "mFD")
            table.add_row(title, *(f"{numbers[name]:.3f}" for numbers in record["results"].values()))
    console = Console()
    console.print(table)
    say = partial(console.print, soft_wrap=True, highlight=False)
    for kind, classifier in record["classifiers"].items():
        accuracy = f"{100 * classifier['accuracy']:.1f} % accuracy on held-out images"
        say(f"classifier {kind}: {classifier['id']}, {accuracy}")
    say(f"DIPD: {record['names']['dipd']}")
    say(f"LPIPS: {record['names']['lpips']}")
    say(f"{distance}: {record['names'][distance]}")
    if record["left_out"]:
        few = ", ".join(f"{name} ({n} images)" for name, n in record["left_out"].items())
        say(f"left out for fewer than {max(record['k'])} images: {few}")
    say(f"written to {out}")
