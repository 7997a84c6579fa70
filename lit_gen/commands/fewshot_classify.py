"""Whether translations help to classify: the few-shot experiment of FUNIT's paper on unseen classes."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lit_gen import __version__
from lit_gen.cli import check_at_least_1, claim, entry_point, show, table
from lit_gen.data.fewshot_module import FewShotDataModule
from lit_gen.errors import ConfigError
from lit_gen.evaluation.classifiers import all_images, evaluation_classifier
from lit_gen.evaluation.translation import classifier_training
from lit_gen.funit.classifier import Classifier, load_classifier
from lit_gen.funit.fewshot import few_shot_accuracy, generated_set
from lit_gen.instantiate import instantiate
from lit_gen.models import funit_run
from lit_gen.runs import write_json


def classify(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """For each of `cfg.splits` draws of `cfg.shots` real images a target class: the accuracy of a linear head
    on the other target images, fitted without translations and with each number of `cfg.num`; writes
    `classification.json`, prints means and deviations over the draws and returns the record.

    Raises ConfigError for what does not fit together.
    """
    check_at_least_1(cfg, "shots", "splits")
    nums = sorted(set(cfg.num))
    if not nums or nums[0] < 1:
        raise ConfigError(f"num={list(cfg.num)}: give numbers of translations per class, such as [1,50,100].")
    claim(out, "a classification", "classification.json")
    module, run_cfg, path = funit_run(cfg)
    data = instantiate(run_cfg.data)
    network = _features(cfg, run_cfg, data, module.device)
    contents = torch.stack([data.train[int(i)]["image"] for i in data.contents(max(nums) * 4, cfg.seed)])
    found: dict[int, list[float]] = {n: [] for n in (0, *nums)}
    for split in range(cfg.splits):
        shown, images, labels = _split(data, cfg.shots, cfg.seed + split)
        made = {n: generated_set(module.translate, shown, contents, n, cfg.seed + split) for n in nums}
        for n in found:
            found[n].append(
                few_shot_accuracy(
                    network.features, shown, images, labels, made.get(n), cfg.weight_decay, cfg.batch_size
                )
            )
    record = {
        "checkpoint": str(path),
        "shots": cfg.shots,
        "splits": cfg.splits,
        "seed": cfg.seed,
        "classes": len(data.test.classes),
        "accuracy": {str(n): values for n, values in found.items()},
        "versions": {"lit_gen": __version__, "torch": torch.__version__},
    }
    write_json(out / "classification.json", record)
    _print(record, out)
    return record


def _features(
    cfg: DictConfig, run_cfg: DictConfig, data: FewShotDataModule, device: torch.device
) -> Classifier:
    """A network, on the device, that has seen the source classes alone. Raises ConfigError if it knows a
    target class."""
    if cfg.features is None:
        return evaluation_classifier(data, "source", classifier_training(run_cfg), device=device).network
    network, classes, _ = load_classifier(cfg.features)
    if seen := set(classes) & set(data.test.classes):
        raise ConfigError(f"features={cfg.features} was trained on the target class {min(seen)!r}.")
    return network.to(device)


def _split(data: FewShotDataModule, shots: int, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The real images that are shown, and all other target images with their labels. Raises ConfigError for
    a class of which no other is left."""
    numbers = data.example_numbers(shots, seed)
    rest = torch.ones(len(data.test), dtype=torch.bool)
    rest[torch.cat(list(numbers.values()))] = False
    images, labels = all_images(data.test)
    left = labels[rest].bincount(minlength=len(data.test.classes))
    if not left.all():
        raise ConfigError(
            f"shots={shots}: no image of class {data.test.classes[int(left.argmin())]!r} is left to test on; "
            "lower shots."
        )
    return {name: images[some] for name, some in numbers.items()}, images[rest], labels[rest]


def _print(record: dict[str, Any], out: Path) -> None:
    rows = []
    for num, values in record["accuracy"].items():
        mean, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        rows.append(("none" if num == "0" else num, f"{100 * mean:.1f} ± {100 * deviation:.1f} %"))
    title = f"{record['classes']} unseen classes, {record['shots']} real image(s) each"
    columns = ("translations per class", "accuracy ± standard deviation over the draws")
    show(table(title, columns, rows), f"written to {out}")


main = entry_point("fewshot_classify")(lambda cfg: classify(cfg, Path(cfg.out)))

if __name__ == "__main__":
    main()
