"""Autoencoders for the entry points: of a run, or of the files of Stable Diffusion and diffusers."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lit_gen.autoencoder.codec import Codec, write_codec
from lit_gen.autoencoder.module import AutoencoderModule
from lit_gen.autoencoder.networks import AutoencoderKL, as_moments
from lit_gen.data.images import shape_of
from lit_gen.data.latents import latent_statistics
from lit_gen.data.prepared import PreparedImages
from lit_gen.data.shards import Bar, put_files
from lit_gen.errors import ConfigError
from lit_gen.models.loading import load
from lit_gen.precision import full_float32
from lit_gen.pretrained import diffusers

__all__ = ["Encoder", "open_encoder"]


@dataclass
class Encoder:
    """An autoencoder in eval mode on a device. `factor` and `shift` are its own scale of latents, (z - shift)
    factor, numbers or one for each channel; a factor of None is one over their standard deviation, once that
    is known."""

    network: AutoencoderKL
    device: torch.device
    factor: float | list[float] | None = None
    shift: float | list[float] = 0.0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Moments (B, 2 c, h, w) of float32 images (B, C, H, W) in [-1, 1]."""
        with full_float32():
            return as_moments(*self.network.encode(images.to(self.device)))

    @cached_property
    def fingerprint(self) -> str:
        """A name that changes with the weights."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def check(self, dataset: object) -> None:
        """Raises ConfigError for images that it does not take."""
        channels, *size = shape_of(dataset)
        if channels != self.network.channels:
            raise ConfigError(
                f"encoder: it takes images of {self.network.channels} channels, and these have {channels}: "
                f"set data.channels={self.network.channels}."
            )
        self.network.check_size(size)

    def latent_shape(self, dataset: object) -> tuple[int, int, int]:
        """(c, h, w) of what it makes of the images of a data set."""
        _, h, w = shape_of(dataset)
        return self.network.latent_channels, h // self.network.factor, w // self.network.factor

    def write(self, dataset: object, out: str, bar: Bar | None = None) -> bool:
        """Writes the `Codec` of the latents of `dataset`, the training images, that lie in `out` already;
        False: it is there."""
        if Codec(out).is_there():
            return False
        moments = latent_statistics(PreparedImages(f"{out}/train"), bar=bar)
        std = torch.tensor(moments["std"], dtype=torch.float64)
        mean = torch.tensor(moments["mean"], dtype=torch.float64)
        whole = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
        factor = 1 / float(whole) if self.factor is None else self.factor
        with TemporaryDirectory() as folder:
            write_codec(
                Path(folder), self.network, shape_of(dataset), moments, factor=factor, shift=self.shift
            )
            put_files(Path(folder), out)
        return True


def open_encoder(
    source: str, checkpoint: str = "best", *, ema: bool = True, device: str | None = None
) -> Encoder:
    """The autoencoder of a run folder or checkpoint of lit_gen, or of a file or folder of Stable Diffusion's
    or diffusers'. `checkpoint` and `ema` are as in `lit_gen.models.load`. Raises ConfigError for any
    other."""
    path = Path(source)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if (path / "config.yaml").is_file() or path.suffix == ".ckpt":
        module, _, file = load(path, checkpoint, ema=ema, device=str(where))
        if not isinstance(module, AutoencoderModule):
            raise ConfigError(
                f"{file} is of a {type(module).__name__}, which makes no latents: train an autoencoder with "
                "model=autoencoder."
            )
        return Encoder(module.network, where)
    network, scale = diffusers.load(path)
    return Encoder(network.to(where).requires_grad_(False), where, scale.factor, scale.shift)
