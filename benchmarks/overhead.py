"""The framework's tax: CPU time per training step of the whole experiment against a plain loop.

    python benchmarks/overhead.py

Both sides train a network of one weight, so that almost nothing but the loop is measured, in one process and
one thread, in turns; the difference of the medians is what Lightning, our callbacks and the loggers cost.
The goal is below 1 ms a step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import hydra
import lightning.pytorch as pl
import torch

from lit_gen.cli import CONF_DIR
from lit_gen.commands import train as training
from lit_gen.config import schema
from lit_gen.config.experiment import build
from lit_gen.data import KeyedBatches, KeyedDataset
from lit_gen.images import to_float
from lit_gen.rng import keyed_generator

OPTIONS = [
    "trainer=cpu",
    "logger=csv",
    "model.net.base_channels=8",
    "model.net.channel_mult=[1,1]",
    "model.net.num_blocks=1",
    "model.net.attention_resolutions=[]",
    "data.batch_size=16",
    "model.num_classes=0",
    "callbacks.validation.every=1000000",
    "callbacks.quality.every=1000000",
    "callbacks.quality.final_images=2",
    "callbacks.grid.every=1000000",
    "callbacks.checkpoint.every=1000000",
    "sampler.num_steps=1",
    "callbacks.grid.trajectories=0",
    "callbacks.grid.num=1",
]


class OneWeight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, noise_label, label=None, augment_label=None):
        return self.weight * x


class Stopwatch(pl.Callback):
    """CPU seconds from the end of the 20th batch to the end of the last one."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.batches_seen == 20:
            self.start = time.process_time()
        self.end = time.process_time()


def experiment(steps: int, folder: Path):
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = hydra.compose(
            "train", [*OPTIONS, f"trainer.max_steps={steps}", f"logger.csv.save_dir={folder}"]
        )
    made = build(cfg, folder)
    made.module.denoiser.net = OneWeight()
    return made


def framework(steps: int, bare: bool = False) -> float:
    """The whole experiment, or with `bare` Lightning's loop around the same module without callbacks."""
    with tempfile.TemporaryDirectory() as folder:
        made = experiment(steps, Path(folder))
        watch = Stopwatch()
        if bare:
            made.trainer.callbacks.clear()
        made.trainer.callbacks.append(watch)
        made.trainer.fit(made.module, datamodule=made.data)
        return (watch.end - watch.start) / (steps - 20)


def plain(steps: int) -> float:
    """The loop one would write by hand: the same batches, loss, optimizer and average."""
    with tempfile.TemporaryDirectory() as folder:
        made = experiment(steps, Path(folder))
    module, data = made.module.train(), made.data
    optimizer = module.optimizer(module.denoiser.parameters())
    weights = [p for p in module.denoiser.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    keys = iter(KeyedBatches(len(data.train), data.batch_size))
    images = KeyedDataset(data.train)
    for step in range(steps):
        if step == 20:
            start = time.process_time()
        x_0 = to_float(images.__getitems__(next(keys))["image"])
        t, z = module.loss.draw(module.denoiser.process, x_0, keyed_generator(0, "noise", step))
        loss = module.loss(module.denoiser, x_0, t, z).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 0.001)
    return (time.process_time() - start) / (steps - 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schema.register()
    training._quiet()
    ours, lightning, theirs = [], [], []
    for _ in range(options.rounds):
        theirs.append(plain(options.steps))
        lightning.append(framework(options.steps, bare=True))
        ours.append(framework(options.steps))
    a, b, c = (statistics.median(side) * 1e3 for side in (ours, lightning, theirs))
    print(f"CPU ms a step: lit_gen {a:.2f}, bare Lightning {b:.2f}, plain loop {c:.2f}")
    print(f"tax {a - c:.2f} ms, of which Lightning's loop {b - c:.2f} and lit_gen {a - b:.2f}")


if __name__ == "__main__":
    main()
