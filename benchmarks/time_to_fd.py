"""How long the default run trains until its samples are good: the leaderboard of docs/benchmarks.md.

    python benchmarks/time_to_fd.py [--target 1.5] [--every 25] [key=value ...]

trains the default experiment without grids and validation, and keeps the averaged weights every few batches.
Then it draws samples, as many as there are training images and by the run's own sampler: with the weights of
the last batch, and by bisection with those of the first batch whose distance to the test images is below
`target` times the train-test FD. The seconds are those of the training up to there, by the clock and of all
threads.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_gen.callbacks import EMA, evaluating
from lit_gen.cli import CONF_DIR
from lit_gen.config import schema
from lit_gen.config.experiment import build
from lit_gen.instantiate import instantiate
from lit_gen.metrics import Evaluation, frechet_distance
from lit_gen.module import callbacks_of

OFF = ("~callbacks.quality", "~callbacks.grid", "~callbacks.validation", "callbacks.checkpoint.monitor=null")


class Snapshots(pl.Callback):
    """The averaged weights every `every` batches, and the seconds that the training took until then."""

    def __init__(self, every: int):
        self.every = every
        self.kept: list[tuple[int, float, float, dict[str, Tensor]]] = []

    def on_train_start(self, *_: Any) -> None:
        self.start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any, **__: Any) -> None:
        if module.batches_seen % self.every == 0 or module.batches_seen == trainer.max_steps:
            seconds = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            average = callbacks_of(trainer, EMA)[0].shadow
            self.kept.append((module.batches_seen, *seconds, {k: w.clone() for k, w in average.items()}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=float, default=1.5)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    schema.register()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        overrides = ["logger=csv", f"logger.csv.save_dir={folder}", *OFF, *options.overrides]
        experiment = build(hydra.compose("train", overrides), folder)
    trainer, module, data = experiment.trainer, experiment.module, experiment.data
    snapshots = Snapshots(options.every)
    trainer.callbacks.append(snapshots)
    trainer.fit(module, datamodule=data)
    extractor = instantiate(experiment.config["metrics"]["extractor"])
    average = callbacks_of(trainer, EMA)[0]

    def moments(batches: Any) -> Any:
        evaluation, n = Evaluation(extractor), 0
        for images in batches:
            evaluation.update(images, torch.arange(n, n := n + len(images)))
        return evaluation.summary().moments

    test, train = (moments(x.images.split(256)) for x in (data.dataset("test"), data.dataset("train")))
    train_test = frechet_distance(test, train)

    def ratio(i: int) -> float:
        average.shadow = snapshots.kept[i][3]
        with evaluating(trainer):
            rows = torch.arange(train.n).split(256)
            fd = frechet_distance(test, moments(module.sample(r.tolist(), 1) for r in rows))
        print(f"batch {snapshots.kept[i][0]}: {fd / train_test:.3f}", flush=True)
        return fd / train_test

    first, last = 0, len(snapshots.kept) - 1
    _, seconds, cpu, _ = snapshots.kept[last]
    print(f"the whole training: {seconds:.1f} s, {cpu:.1f} CPU s, {torch.get_num_threads()} threads")
    if ratio(last) >= options.target:
        raise SystemExit(f"The run does not come below {options.target} times the train-test FD.")
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if ratio(middle) < options.target else (middle + 1, last)
    step, seconds, cpu, _ = snapshots.kept[last]
    print(f"below {options.target} times the train-test FD, {train_test:.4f}, at batch {step}: ", end="")
    print(f"{seconds:.1f} s, {cpu:.1f} CPU s")


if __name__ == "__main__":
    main()
