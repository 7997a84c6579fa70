"""The pipelines of diffusers in exported folders. `lit_gen.export.bundle` writes them there, with all that
they need of lit_gen, into `pipeline.py`, which ends with a subclass that says which model it is."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import (  # pyright: ignore[reportMissingImports]
    DiffusionPipeline,
    ImagePipelineOutput,
)
from torch import Tensor, nn

from lit_gen.rng import PerSample
from lit_gen.score.condition import Condition
from lit_gen.score.denoiser import Denoiser, bound
from lit_gen.score.precondition import Precondition
from lit_gen.score.sde import Process

__all__ = ["SamplePipeline", "StylePipeline", "TranslationPipeline"]


class _Stock(nn.Module):
    """A `UNet2DModel` as a network of lit_gen."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, noise_label: Tensor, label: Tensor | None = None, *_: Any) -> Tensor:
        return self.unet(x, noise_label, class_labels=label).sample


class SamplePipeline(DiffusionPipeline):
    """Images of a score model by the sampler that lit_gen samples it by."""

    process: Process
    precondition: Precondition
    sampler: partial[Tensor]
    shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int = 0
    center: float = 0.0  # what was subtracted from the images

    def __init__(self, unet: Any):
        super().__init__()
        self.register_modules(unet=unet)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | Sequence[int] | int | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """`images`: of PIL, or "np" (N, H, W, C) or "pt" (N, C, H, W) with values from 0 to 1.

        `class_labels`: of all images, or one for each; None: image i is of class i mod num_classes. `vector`
        (N, V) and `image` (N, C, h, w) are what else the model takes. A list of generators, one for each
        image, makes an image independent of the others.
        """
        if self.num_classes and class_labels is None:
            class_labels = [i % self.num_classes for i in range(batch_size)]
        if isinstance(class_labels, int):
            class_labels = [class_labels] * batch_size
        label = None if class_labels is None else torch.as_tensor(class_labels)
        condition = Condition(label, vector, image).to(self.device)
        x = self._drawn(batch_size, condition, num_inference_steps, generator)
        return self._output(x, output_type, return_dict)

    def _drawn(self, n: int, condition: Condition, steps: int | None, generator: Any) -> Tensor:
        """float (N, C, H, W) in [-1, 1]."""
        unet = self.unet if hasattr(self.unet, "from_lit_gen") else _Stock(self.unet)
        denoiser, label = bound(Denoiser(unet, self.process, self.precondition), condition)
        draws = PerSample(generator) if isinstance(generator, list) else generator
        x = self.process.prior_sample((n, *self.shape), draws, device=self.device)
        options = {} if steps is None else {"num_steps": steps}
        x_0 = self.sampler(denoiser, x, label=label, generator=draws, **options)
        return x_0.to(torch.float32) + self.center

    def _output(self, x: Tensor, output_type: str, return_dict: bool) -> Any:
        images: Any = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class StylePipeline(SamplePipeline):
    """Content images in the style of a class that K images show, by denoising."""

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        content: Any,
        class_images: Any,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """`images` as of SamplePipeline; `content` and `class_images` are images of PIL, or float
        (N, C, H, W) in [-1, 1]."""
        code = self.unet.style_code(_floats(class_images).to(self.device)[None] - self.center)
        shown = _floats(content).to(self.device) - self.center
        told = Condition(vector=code.expand(len(shown), -1), image=shown)
        return self._output(
            self._drawn(len(shown), told, num_inference_steps, generator), output_type, return_dict
        )


class TranslationPipeline(DiffusionPipeline):
    """Content images in a class that K images show, by FUNIT."""

    def __init__(self, generator: Any):
        super().__init__()
        self.register_modules(generator=generator)

    @torch.no_grad()
    def __call__(
        self, content: Any, class_images: Any, output_type: str = "pil", return_dict: bool = True
    ) -> Any:
        """`images` and arguments as of StylePipeline."""
        network, shown = self.generator, _floats(content).to(self.device)
        code = network.class_code(_floats(class_images).to(self.device)[None])
        x = network.decode(network.content_code(shown), code.expand(len(shown), -1))
        return SamplePipeline._output(self, x, output_type, return_dict)  # pyright: ignore[reportArgumentType]


def _floats(images: Any) -> Tensor:
    """Images of PIL, one or a list, or float (N, C, H, W) in [-1, 1], as the latter."""
    if isinstance(images, Tensor):
        return images
    pictures = images if isinstance(images, list | tuple) else [images]
    arrays = [np.atleast_3d(np.asarray(picture, np.float32)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
