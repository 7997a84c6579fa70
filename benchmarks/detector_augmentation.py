"""Which augmentation helps a detector that overfits? The table of docs/detection.md: BCCD's blood smears,
few of them for training, the same number of steps for every arm.

    LITGEN_DATA=<folder with bccd-voc.zip> python benchmarks/detector_augmentation.py --out cells.jsonl \
        --arms none flip_boxes detection_v0 detection_v1 detection_v2 detection_v3 randaugment mosaic

An arm is none, a file of conf/augment, the path of a file like them (a search's augment/found.yaml), or the
sub-policies themselves: "[[[FlipX_BBox,0.5,null],[FlipY_BBox,0.5,null]]]".
Each cell (arm, seed) trains a detector on the smears that the seed draws, and appends a line to --out; cells
that are there are not trained again. --table prints what is there: means over the seeds, their standard
errors, and the paired differences from no augmentation.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from lit_gen import rng
from lit_gen.augment import AutoAugment, Policy
from lit_gen.cli import CONF_DIR
from lit_gen.config import schema
from lit_gen.data.detection_module import DetectionDataModule
from lit_gen.detection.networks import small_fcos
from lit_gen.instantiate import instantiate
from lit_gen.schedules import train_one_cycle
from lit_gen.search.detector import boxed, detection_scores


class Chosen:
    """Some images of a detection set, in memory."""

    def __init__(self, dataset: Any, rows: list[int]):
        self.items = [dataset[i] for i in rows]
        self.classes, self.image_size = dataset.classes, dataset.image_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(self.items[i])


def augmentation_of(arm: str) -> Any:
    """What conf/augment, a file like those in it, or the text of a policy says."""
    if arm.startswith("["):
        return AutoAugment(Policy(yaml.safe_load(arm)))
    file = Path(arm) if arm.endswith(".yaml") else CONF_DIR / "augment" / f"{arm}.yaml"
    return None if arm == "none" else instantiate(OmegaConf.load(file))


def cell(arm: str, seed: int, options: argparse.Namespace, train: Any, test: Any) -> dict[str, Any]:
    """Scores on the test smears, for none also after a quarter and a half of the steps, and on the training
    smears."""
    order = torch.randperm(len(train), generator=rng.keyed_generator(seed, "smears"))
    smears = Chosen(train, order[: options.smears].tolist())
    augment = augmentation_of(arm)
    data = DetectionDataModule(
        smears, test, options.batch_size, augment=augment, seed=seed, num_workers=0, pin_memory=False
    )
    torch.manual_seed(rng.key(seed, "weights") % 2**63)
    net = small_fcos(len(train.classes), options.size, levels=3)
    tests, began = boxed(test, range(len(test))), time.process_time()
    scores, seconds = {}, 0.0

    def losses() -> Iterator[Tensor]:
        nonlocal seconds
        for step, batch in zip(range(options.steps), data.train_dataloader(), strict=False):
            if arm == "none" and 4 * step in (options.steps, 2 * options.steps):
                seconds -= time.process_time()
                scores[step] = detection_scores(net.eval(), tests)
                net.train()
                seconds += time.process_time()
            batch = data.on_after_batch_transfer(batch, 0)
            pairs = zip(batch["boxes"], batch["labels"], strict=True)
            yield reduce(
                torch.add, net(list(batch["image"]), [{"boxes": b, "labels": y} for b, y in pairs]).values()
            )

    train_one_cycle(net, torch.optim.Adam(net.parameters(), lr=options.rate), losses(), options.steps)
    seconds = time.process_time() - began - seconds
    scores[options.steps] = detection_scores(net, tests)
    own = detection_scores(net, boxed(smears, range(len(smears))))
    return {"arm": arm, "seed": seed, "test": scores, "train": own, "cpu_seconds": round(seconds, 1)}


def mean_and_error(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{v:.3f}" for v in values)
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def table(cells: list[dict[str, Any]], arms: list[str]) -> None:
    """A row for each arm, as Markdown."""
    by = {(c["arm"], c["seed"]): c for c in cells}

    def score(arm: str, seed: int, name: str) -> float:
        *_, last = by[arm, seed]["test"].values()
        return last[name]

    columns = ["arm", "seeds", "mAP", "against none", "better", "mAP50", "against none"]
    columns += ["mAP, training smears", "CPU s"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for arm in arms:
        seeds = sorted(s for a, s in by if a == arm)
        paired = [s for s in seeds if ("none", s) in by and arm != "none"]
        row = [arm, str(len(seeds))]
        for name in ("map", "map50"):
            gains = [score(arm, s, name) - score("none", s, name) for s in paired]
            row += [mean_and_error([score(arm, s, name) for s in seeds]), mean_and_error(gains)]
            row += [f"{sum(g > 0 for g in gains)} of {len(gains)}"] if name == "map" else []
        row.append(f"{statistics.mean(by[arm, s]['train']['map'] for s in seeds):.3f}")
        row.append(f"{statistics.mean(by[arm, s]['cpu_seconds'] for s in seeds):.0f}")
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("detector_augmentation.jsonl"))
    parser.add_argument("--arms", nargs="+", default=["none", "detection_v1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    for name, value in (("smears", 20), ("steps", 300), ("batch-size", 8), ("size", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    settings = {k: getattr(options, k) for k in ("smears", "steps", "batch_size", "size", "rate")}

    def cells() -> list[dict[str, Any]]:
        lines = options.out.read_text().splitlines() if options.out.exists() else []
        return [c for c in map(json.loads, lines) if c["settings"] == settings]

    if options.table:
        return table(cells(), options.arms)
    torch.set_num_threads(1)
    schema.register()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("train", ["experiment=detector_bccd", f"data.image_size={options.size}"])
    data = instantiate(config.data)
    train, test = (Chosen(x, list(range(len(x)))) for x in (data.train, data.test))
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, seed) in {(c["arm"], c["seed"]) for c in cells()}:
                continue
            line = json.dumps(cell(arm, seed, options, train, test) | {"settings": settings})
            with options.out.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
