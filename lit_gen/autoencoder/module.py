"""AutoencoderModule: trains an autoencoder whose latents a score model can learn."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lit_gen.autoencoder.networks import AutoencoderKL, PatchDiscriminator, kl_divergence
from lit_gen.errors import ConfigError, check_choice
from lit_gen.images import BYTES, Pixels
from lit_gen.module import SingleOptimizerModule

DISTANCES = {"l1": torch.abs, "l2": torch.square}


class Perceptual(Protocol):
    """A distance of images (B, C, H, W) in [-1, 1] that can be differentiated, (B,); `load` brings its
    weights to a device, and raises ConfigError where there are none."""

    def load(self, device: torch.device) -> None: ...

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor: ...


@runtime_checkable
class GivesImages(Protocol):
    """Data whose "test" set has items {"image": (C, H, W) as it is stored}."""

    def dataset(self, split: str) -> Any: ...


class AutoencoderModule(SingleOptimizerModule):
    """A KL autoencoder (Rombach et al. 2022, https://arxiv.org/abs/2112.10752): the mean over a batch's
    pixels of the `reconstruction` ("l1" or "l2") and of the `perceptual` distance times `perceptual_weight`,
    plus `kl_weight` times the divergence of an image's latents from N(0, I), in nats for each of its pixels'
    values.

    A `discriminator` adds, from batch `adversarial_start` on, `adversarial_weight` times minus what it says
    of reconstructions; it learns from the first batch on by the hinge loss. Both networks step at once, by
    one optimizer and one backward pass: the discriminator's gradient is of its own loss alone, and the
    autoencoder's of all else, so that processes and resumed runs need nothing of their own.

    Its "samples" are reconstructions of the test images, without a draw, and the Frechet distance to the test
    images that a callback measures is rFD. `image_shape` is (C, H, W), `pixels` says how images are stored.
    """

    batch_keys = frozenset({"image"})
    next_commands: ClassVar[dict[str, str]] = {
        "make latents": "lit-gen prepare encoder={run} data=... out=<folder>",
    }
    image_source: GivesImages | None = None
    """Where the images that are reconstructed come from; in training the data module."""

    def __init__(
        self,
        network: AutoencoderKL,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        image_shape: Sequence[int],
        pixels: Pixels = BYTES,
        reconstruction: str = "l1",
        kl_weight: float = 1e-6,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        discriminator: PatchDiscriminator | None = None,
        adversarial_weight: float = 0.1,
        adversarial_start: int = 0,
        lr_schedule: Callable[[int], float] | None = None,
        compile: bool | str = False,
        seed: int = 0,
        log_every: int = 50,
    ):
        super().__init__(optimizer, lr_schedule, seed, log_every, compile)
        check_choice("model.reconstruction", reconstruction, DISTANCES)
        not_negative = {
            "kl_weight": kl_weight,
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "adversarial_start": adversarial_start,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise ConfigError(f"model.{name}={value}: cannot be negative.")
        _check_images(network, discriminator, image_shape)
        self.network, self.discriminator = network, discriminator
        self.image_shape, self.pixels = tuple(image_shape), pixels
        self.reconstruction, self.kl_weight = reconstruction, kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start

    def ema_network(self) -> nn.Module:
        return self.network

    def compiled_networks(self) -> Iterable[nn.Module]:
        return (self.network,) if self.discriminator is None else (self.network, self.discriminator)

    # --- training ---

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = vars(self.trainer).get("datamodule")
        self.image_source = data if isinstance(data, GivesImages) else None
        if self.perceptual is not None:
            self.perceptual.load(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["image"]
        whole, factor = self.whole_batch(x), self.network.factor
        shape = (len(whole), self.network.latent_channels, *(side // factor for side in x.shape[2:]))
        noise = torch.randn(shape, generator=self.step_generator("latents"), device=x.device)
        restored, mean, deviation = self.network(x, self.local_shard(noise))
        parts = {"reconstruction": self._distance(restored, x).mean()}
        parts["kl"] = kl_divergence(mean.float(), deviation.float()).mean() / x[0].numel()
        loss = parts["reconstruction"] + self.kl_weight * parts["kl"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(restored, x).mean()
            loss = loss + self.perceptual_weight * parts["perceptual"]
        if self.discriminator is not None:
            parts |= self._adversarial(self.discriminator, restored, x)
            weight = self.adversarial_weight if self.batches_seen >= self.adversarial_start else 0.0
            loss = loss + weight * parts["adversarial"] + parts["discriminator"]
        self.watch(loss, parts)
        self.log_step(loss, **parts)
        return loss

    def _adversarial(
        self, discriminator: PatchDiscriminator, restored: Tensor, x: Tensor
    ) -> dict[str, Tensor]:
        """What the autoencoder and the discriminator lose to each other, either without a gradient for the
        other."""
        frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
        judged = torch.func.functional_call(discriminator, frozen, (restored,))
        real, fake = discriminator(torch.cat([x, restored.detach()])).chunk(2)
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return {"adversarial": -judged.mean(), "discriminator": hinge}

    def _distance(self, restored: Tensor, x: Tensor) -> Tensor:
        return DISTANCES[self.reconstruction](restored.float() - x)

    @torch.no_grad()
    def validation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) distances of the images from their reconstructions, without a draw."""
        return self._distance(self.reconstruct(batch["image"]), batch["image"]).flatten(1).mean(1)

    # --- reconstructing ---

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) by way of the means of their latents, float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.network.decode(self.network.encode(x)[0])

    @property
    def sampler(self) -> Callable[..., Tensor]:
        """The only way to its images."""
        return self.reconstruct

    def sample(self, indices: Sequence[int], seed: int = 0, sampler: Any = None) -> Tensor:
        """Reconstructions (N, C, H, W), as the data are stored, of the test images of these numbers, modulo
        how many there are; the same for every seed."""
        if len(indices) == 0:
            return torch.zeros((0, *self.image_shape), dtype=self.pixels.torch_dtype, device=self.device)
        return self.pixels.from_model(self.reconstruct(self._originals(indices)))

    def sample_trajectory(self, indices: Sequence[int], seed: int = 0, num_frames: int = 10) -> Tensor:
        """Each image and its reconstruction, uint8 (N, 2, C, H, W)."""
        pair = self.pixels.from_model(self._originals(indices)), self.sample(indices)
        return torch.stack([self.pixels.to_uint8(images) for images in pair], 1)

    def sampler_name(self, sampler: Any = None) -> str:
        return "reconstruction"

    def check(self, sampler: Any = None) -> None:
        if sampler is not None:
            raise ConfigError("An autoencoder reconstructs images, without a sampler: leave sampler out.")

    def _originals(self, indices: Sequence[int]) -> Tensor:
        if self.image_source is None:
            raise ConfigError("An autoencoder reconstructs the test images of its run, and none are known.")
        test = self.image_source.dataset("test")
        images = [torch.as_tensor(test[i % len(test)]["image"]) for i in indices]
        return self.pixels.to_model(torch.stack(images).to(self.device, non_blocking=True))


def _check_images(
    network: AutoencoderKL, discriminator: PatchDiscriminator | None, shape: Sequence[int]
) -> None:
    """Raises ConfigError for images of a shape (C, H, W) that one of the networks does not take."""
    channels, *size = shape
    for name, net in {"network": network, "discriminator": discriminator}.items():
        if net is not None and net.channels != channels:
            raise ConfigError(
                f"model.{name}.channels={net.channels}: the images have {channels}. Give both the same."
            )
    network.check_size(size)
    if discriminator is not None and min(size) < discriminator.smallest:
        raise ConfigError(
            f"model.discriminator: images of {size[0]}x{size[1]} leave nothing to judge; from "
            f"{discriminator.smallest} pixels on they do. Take fewer layers, or larger images."
        )
