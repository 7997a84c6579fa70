"""Codec: what stands between a score model of latents and pictures."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from lit_gen.autoencoder.networks import AutoencoderKL
from lit_gen.errors import ConfigError, check_choice

DESCRIPTION, WEIGHTS = "latents.json", "autoencoder.safetensors"
PIXELS_AT_ONCE = 2**20  # that are decoded


class Codec:
    """The autoencoder of prepared latents, which lie beside it in `path` (`lit-gen prepare encoder=...`), a
    folder or a URL; and the scale on which a score model sees them.

    `normalize` is "channels", each channel with mean 0 and the standard deviation `std` over the training
    images, as EDM2 has it (Karras et al. 2024, https://arxiv.org/abs/2312.02696), or "factor", all channels
    times the autoencoder's own factor (0.18215 of Stable Diffusion's), as DiT and SiT have it. Nothing is
    read before it is needed. Raises ConfigError then for what is not there.
    """

    def __init__(self, path: str | Path, normalize: str = "channels", std: float = 0.5):
        check_choice("data.codec.normalize", normalize, ("channels", "factor"))
        if not std > 0:
            raise ConfigError(f"data.codec.std={std}: must be positive.")
        self.path, self.normalize, self.std = str(path).rstrip("/"), normalize, std
        self._network: AutoencoderKL | None = None

    @cached_property
    def described(self) -> dict[str, Any]:
        """`latents.json`: "network", the autoencoder's options; "factor" and "shift", its own scale,
        numbers or one for each channel; "mean" and "std", those of the latents of the training images, by
        channel; "shape", of its pictures."""
        return json.loads(self._read(DESCRIPTION))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures."""
        c, h, w = self.described["shape"]
        return c, h, w

    def normalized(self, latents: Tensor) -> Tensor:
        """Latents (..., C, h, w) as a score model sees them."""
        mean, std = self._scale(latents)
        return (latents - mean) / std

    def latents(self, x: Tensor) -> Tensor:
        """The inverse of `normalized`."""
        mean, std = self._scale(x)
        return x * std + mean

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W), float32 about in [-1, 1], of normalized latents (B, c, h, w)."""
        network = self.network(x.device)
        z = self.latents(x).to(torch.float32)
        _, height, width = self.shape
        at_once = max(PIXELS_AT_ONCE // (height * width), 1)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([network.decode(part) for part in z.split(at_once)])

    def network(self, device: torch.device | str) -> AutoencoderKL:
        """The autoencoder on the device, in eval mode."""
        if self._network is None:
            network = AutoencoderKL(**self.described["network"])
            network.load_state_dict(safetensors.torch.load(self._read(WEIGHTS)))
            self._network = network.eval().requires_grad_(False)
        if next(self._network.parameters()).device != torch.device(device):
            self._network.to(device)
        return self._network

    def copy(self, folder: Path) -> None:
        """Writes its files into a folder, whole. Raises ConfigError where those of other latents are."""
        there = folder / DESCRIPTION
        if there.is_file() and json.loads(there.read_text()) != self.described:
            raise ConfigError(
                f"{folder} is of other latents than {self.path}: a run keeps its autoencoder. Give the "
                "latents that it began with, or begin a new run."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, DESCRIPTION):
            part = folder / f".{name}.part"
            part.write_bytes(self._read(name))
            part.replace(folder / name)

    def check_latents(self, folder: str) -> None:
        """Raises ConfigError where the latents in a folder or URL are described otherwise than those of this
        codec: a run that is resumed, or whose data.path alone has changed. Latents without a description may
        be anything."""
        other = Codec(folder)
        if other.path == self.path or not other.is_there():
            return
        if other.described != self.described:
            raise ConfigError(
                f"data.path={folder} has other latents than those that {self.path} decodes: give the latents "
                "that the run began with, or begin a new run. If they are meant, set data.codec.path too."
            )

    def is_there(self) -> bool:
        """Whether its description can be read."""
        try:
            return bool(self.described)
        except ConfigError:
            return False

    def use(self, folder: Path) -> None:
        """Reads from this folder if it has the files, those of a run, rather than from where the data
        are."""
        if (folder / DESCRIPTION).is_file():
            self.path = str(folder)

    def _read(self, name: str) -> bytes:
        try:
            with fsspec.open(f"{self.path}/{name}", "rb") as file:
                return file.read()  # pyright: ignore[reportAttributeAccessIssue] an OpenFile gives a file
        except Exception as error:  # every storage has its own
            raise ConfigError(
                f"{self.path}/{name}: cannot be read ({error}). Latents and their autoencoder are written by "
                "lit-gen prepare encoder=... data=... out=..."
            ) from error

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted and by what is divided, (C, 1, 1) each."""
        described, c = self.described, like.shape[-3]
        if self.normalize == "channels":
            mean, std = described["mean"], [s / self.std for s in described["std"]]
        else:
            shift, factor = described["shift"], described["factor"]
            mean = shift if isinstance(shift, list) else [shift] * c
            std = [1 / f for f in (factor if isinstance(factor, list) else [factor] * c)]
        return _column(mean, like), _column(std, like)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_network": None}


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype)[:, None, None].to(like.device, non_blocking=True)


def write_codec(
    folder: Path,
    network: AutoencoderKL,
    shape: Sequence[int],
    moments: dict[str, list[float]],
    **own: float | list[float],
) -> None:
    """The files of a `Codec`: its network, the pictures' shape, "mean" and "std" of the latents, and the
    autoencoder's own "factor" and "shift"."""
    described = {"network": network.options, "shape": list(shape)} | moments | own
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights))
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2))
