"""Few-shot translation by denoising: FUNIT's task (Liu et al. 2019, https://arxiv.org/abs/1905.01723)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.images import to_float
from lit_gen.score.condition import Condition
from lit_gen.score.module import ScoreModule
from lit_gen.score.networks.styled import StyledUNet

__all__ = ["TranslationModule"]


class TranslationModule(ScoreModule):
    """A score model that draws what a content image shows in the style of K images of a class.

    Unsupervised as FUNIT is: a training image, "content", is drawn from "content_view"
    (`data.content_augment` of it; itself without) and the mean code of "style" (`data.style_images` others of
    its class). `net` is a `StyledUNet`. `center`, the mean of all pixels in [-1, 1], is subtracted from every
    image. `condition_dropout.vector` drops the style, so that
    `guidance=classifier_free guidance.parts=[vector]` can strengthen it.
    """

    batch_keys = frozenset({"content", "style"})
    next_commands: ClassVar[dict[str, str]] = {
        "translate": "lit-gen translate run={run} content=<image or folder> classes=<folder>",
        "evaluate": "lit-gen evaluate-translation run={run} k=[1,5,10,15,20]",
    }

    def __init__(self, net: StyledUNet, *args: Any, center: float = 0.0, **options: Any):
        if not isinstance(net, StyledUNet):
            raise ConfigError(f"model.net is a {type(net).__name__}, which has no style: model/net=styled.")
        super().__init__(net, *args, **options)
        self.center = center

    @property
    def network(self) -> StyledUNet:
        return next(part for part in self.denoiser.modules() if isinstance(part, StyledUNet))

    # --- training ---

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Any batch with `batch_keys` will do."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        told = {
            "image": batch["content"] - self.center,
            "vector": self.network.style_code(batch["style"] - self.center),
            "condition_image": batch.get("content_view", batch["content"]) - self.center,
        }
        return super().training_step(told, batch_idx)

    def sharded_networks(self) -> Iterable[nn.Module]:
        raise ConfigError("trainer=fsdp: the style is encoded outside of what gathers weights: trainer=ddp.")

    # --- translating ---

    @property
    def channels(self) -> int:
        return self.image_shape[0]

    @property
    def generator_ema(self) -> "TranslationModule":
        """What `lit_gen.funit.translator` calls the generator."""
        return self

    @torch.no_grad()
    def class_code(self, images: Tensor) -> Tensor:
        """Class images, float in [-1, 1], (K, C, H, W) -> their mean code (code_size,); (N, K, C, H, W) ->
        (N, code_size)."""
        images = images.to(self.device) - self.center
        code = self.network.style_code(images if images.ndim == 5 else images[None])
        return code if images.ndim == 5 else code[0]

    def content_code(self, content: Tensor) -> Tensor:
        return content

    def decode(self, content: Tensor, code: Tensor) -> Tensor:
        """Contents (N, C, H, W) in the style of codes (N, code_size): float (N, C, H, W) in [-1, 1], by the
        module's sampler, with noise of (0, number of the row). Raises ConfigError where gradients are asked
        for."""
        if torch.is_grad_enabled():
            raise ConfigError("adapt= needs gradients of translations, which a sampler has not: adapt=0.")
        return to_float(self._drawn(content, code))

    @torch.no_grad()
    def translate(self, content: Tensor, classes: Tensor) -> Tensor:
        """Content images (N, C, H, W), float in [-1, 1], into the class that `classes` says, a code
        (code_size,), codes (N, code_size) or K images (K, C, H, W): uint8 (N, C, H, W)."""
        code = self.class_code(classes) if classes.ndim >= 4 else classes
        return self._drawn(content, code.expand(len(content), -1))

    def _drawn(self, content: Tensor, code: Tensor) -> Tensor:
        told = Condition(vector=code, image=content.to(code) - self.center)
        return self.sample(range(len(content)), condition=told)

    def pictures(self, x_0: Tensor) -> Tensor:
        return super().pictures(x_0 + self.center)
