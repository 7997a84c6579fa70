"""Pictures while training: grids of samples, and how one sample comes out of noise."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lit_gen.callbacks.contracts import Periodic, Sampler, Samples, SamplesTrajectories, of
from lit_gen.callbacks.ema import evaluating
from lit_gen.data.module import KeyedDataModule
from lit_gen.data.sound import LogMel, save_wav
from lit_gen.errors import ConfigError
from lit_gen.images import grid, save_png, shown_channels
from lit_gen.metrics.distributed import gather_batches, own_batches
from lit_gen.module import BaseModule

__all__ = ["SampleGrid", "show"]

SOUNDS = 4  # of a grid, to be heard


class SampleGrid(Periodic):
    """Every `every` batches and at the end: a grid of `num` samples from the EMA weights, always of the same
    seeds, as `grids/samples_<batches>.png` and to W&B as `samples/grid`; at the end also
    `samples/trajectory`, one row a sample, from noise on the left to the image on the right.

    `sampler` is the one of the grids while training, None the module's own, which the last grid and the
    trajectories always have: a cheap one shows as well how far the training is.

    The module draws: `module.sample(indices, seed, sampler)`, (N, C, H, W) as `module.pixels` says, and
    `module.sample_trajectory(indices, seed, num_frames) -> uint8 (N, F, C, H, W)`. Of other numbers of
    channels than one or three, those of `pixels.shown` are shown. Where pictures are of sounds, the first
    four of a grid are also written as `grids/sound_<k>_<batches>.wav` and sent to W&B as `samples/sound`.
    """

    requires = SamplesTrajectories

    def __init__(
        self,
        every: int = 1000,
        num: int = 64,
        seed: int = 0,
        trajectories: int = 4,
        frames: int = 10,
        scale: int = 0,
        sampler: Sampler | None = None,
    ):
        super().__init__(every, "callbacks.grid")
        if num < 1:
            raise ConfigError(f"callbacks.grid.num={num}: must be at least 1 image.")
        self.num, self.seed = num, seed
        self.trajectories, self.frames, self.scale = trajectories, frames, scale
        self.sampler = sampler

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.sampler is not None:
            of(pl_module, Samples).check(self.sampler)

    def act(self, trainer: Trainer, module: BaseModule) -> None:
        self.draw(trainer, module, self.sampler)

    def finish(self, trainer: Trainer, module: BaseModule) -> None:
        if self.sampler is not None or module.batches_seen % self.every:
            self.draw(trainer, module)
        if not self.trajectories:
            return
        with evaluating(trainer):  # on every rank
            if not trainer.is_global_zero:
                return
            frames = of(module, SamplesTrajectories).sample_trajectory(
                range(self.trajectories), self.seed, self.frames
            )
        shown = shown_channels(frames, module.pixels.shown)
        picture = grid(shown.flatten(0, 1), columns=frames.shape[1], scale=self.scale)
        caption = f"seeds {self.seed}:0-{self.trajectories - 1}"
        show(trainer, "trajectory", picture, module.batches_seen, caption)

    def draw(self, trainer: Trainer, module: BaseModule, sampler: Sampler | None = None) -> None:
        """Every rank samples its share; rank 0 puts the picture together."""
        model = of(module, Samples)
        share = -(-self.num // trainer.world_size)
        with evaluating(trainer):
            parts = own_batches(self.num, share)
            own = [model.sample(part, self.seed, sampler) for part in parts]
        images = gather_batches(own, self.num, share)
        if images is not None:
            seeds = f"seeds {self.seed}:0-{self.num - 1}"
            caption = f"batch {module.batches_seen}, {model.sampler_name(sampler)}, {seeds}, EMA weights"
            shown = module.pixels.picture(images)
            show(trainer, "grid", grid(shown, scale=self.scale), module.batches_seen, caption)
            data = vars(trainer).get("datamodule")
            if isinstance(data, KeyedDataModule) and data.sound is not None:
                _hear(trainer, data.sound, images[:SOUNDS], module.batches_seen, seeds)


def show(trainer: Trainer, name: str, picture: Tensor, step: int, caption: str) -> Path:
    """Writes uint8 (3, H, W) as `grids/<name>_<step>.png` of the run folder and sends it to W&B as
    `samples/<name>`."""
    path = save_png(picture, Path(trainer.default_root_dir) / "grids" / f"{name}_{step:07d}.png")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"samples/{name}", [str(path)], step=step, caption=[caption])
    return path


def _hear(trainer: Trainer, sound: LogMel, images: Tensor, step: int, caption: str) -> None:
    """Writes the sounds of pictures (N, 1, bands, frames) in [-1, 1] and sends them to W&B."""
    folder = Path(trainer.default_root_dir) / "grids"
    paths = [folder / f"sound_{k}_{step:07d}.wav" for k in range(len(images))]
    for wave, path in zip(sound.wave(images), paths, strict=True):
        save_wav(wave, path, sound.rate)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_audio(
                "samples/sound", list(map(str, paths)), step=step, caption=[caption] * len(paths)
            )
