"""One iteration of FUNIT's training, without a framework (Liu et al. 2019, https://arxiv.org/abs/1905.01723).

Discriminator first, then the generator on the same batch against the updated discriminator, then the average
of the generator's weights. The generator does not change in between, so its one forward pass serves both; the
discriminator is frozen in the generator's turn (nobody reads its weight gradients there) and looks at real
images without a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.funit import losses
from lit_gen.funit.losses import Parts
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator


class Batch(NamedTuple):
    """Content images (B, C, H, W) and class images (B, C, H, W), in [-1, 1], each with labels int64 (B,).

    `same_class`: other images (B, C, H, W) of the content images' classes, for a reconstruction that cannot
    copy. `content_view`: the content images, augmented, as the content encoder sees them; all else sees
    `content`.
    """

    content: Tensor
    content_label: Tensor
    classes: Tensor
    class_label: Tensor
    same_class: Tensor | None = None
    content_view: Tensor | None = None

    def split(self, n: int) -> list["Batch"]:
        """n equal parts. Raises ConfigError if n does not divide the batch."""
        size = len(self.content)
        if n < 1 or size % n:
            raise ConfigError(
                f"A batch of {size} cannot be worked off in {n} equal parts; choose a divisor of {size}."
            )
        columns = [[None] * n if tensor is None else tensor.chunk(n) for tensor in self]
        return [Batch(*part) for part in zip(*columns, strict=True)]


class Outputs(NamedTuple):
    """What the generator makes of a batch: content in the class of the class images, and in its own."""

    translated: Tensor
    reconstructed: Tensor


@dataclass(frozen=True)
class Objective:
    """FUNIT eq. 3 with its weights; the defaults are the paper's, but for the form of the penalty.

    `penalty(logits, images) -> (loss, parts)` on real images carries its own weight:
    `losses.gradient_penalty`, `losses.official_gradient_penalty`, either with other weights by
    `functools.partial`, or None for no penalty.

    `content_codes` weighs `losses.content_consistency`, which costs two more passes of the content encoder,
    and `cycle` the mean absolute difference between a content image and its translation translated back into
    the content's class (cycle consistency, Zhu et al. 2017, eq. 2, https://arxiv.org/abs/1703.10593), whose
    class code is taken as it is; the paper has neither.

    `augment`, with `apply(images, draws)` and `draw(n, generator, device)`, distorts whatever the
    discriminator sees, real and made, in both turns; the gradients pass through it
    (`lit_gen.augment.differentiable`). `draws` (B, 4, ...) then says how: the real and the made image of D's
    turn; in G's turn the class image and its translation alike, and the content and its reconstruction.
    """

    adversarial: float = 1.0
    reconstruction: float = 0.1
    features: float = 1.0
    penalty: Callable[[Tensor, Tensor], tuple[Tensor, Parts]] | None = losses.gradient_penalty
    augment: Any = None
    content_codes: float = 0.0
    cycle: float = 0.0

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
        """`draws` for n images; None without `augment`."""
        if self.augment is None:
            return None
        return self.augment.draw(4 * n, generator, device).unflatten(0, (n, 4))

    def _seen(self, images: Tensor, draws: Tensor | None) -> Tensor:
        return images if self.augment is None else self.augment.apply(images, draws)

    def discriminator(
        self, network: PatchDiscriminator, batch: Batch, translated: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Parts]:
        """Class images are the real ones, translations the fake ones; (loss, parts) of D's turn."""
        real = batch.classes.detach().requires_grad_(self.penalty is not None)
        # `forward` itself: were the network compiled, its graph could not be differentiated twice.
        judged = network if self.penalty is None else network.forward
        first, second = (None, None) if draws is None else draws[:, :2].unbind(1)
        real_logits, _ = judged(self._seen(real, first), batch.class_label)
        fake_logits, _ = network(self._seen(translated.detach(), second), batch.class_label)
        loss, parts = losses.hinge_discriminator(real_logits, fake_logits)
        loss = self.adversarial * loss
        if self.penalty is not None:
            penalty, penalty_parts = self.penalty(real_logits, real)
            loss, parts = loss + penalty, parts | penalty_parts
        return loss, parts

    def generator(
        self, network: PatchDiscriminator, batch: Batch, outputs: Outputs, draws: Tensor | None = None
    ) -> tuple[Tensor, Parts]:
        """(loss, parts) of G's turn, for a frozen `network`; it sees two batches, one made and one real."""
        labels = torch.cat([batch.class_label, batch.content_label])
        alike = None if draws is None else draws[:, 2:].transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            _, real = network(self._seen(torch.cat([batch.classes, batch.content]), alike), labels)
        logits, fake = network(self._seen(torch.cat(outputs), alike), labels)
        (f_translated, f_reconstructed), (f_classes, f_content) = fake.chunk(2), real.chunk(2)
        adversarial, parts = losses.hinge_generator(*logits.chunk(2))
        pixels, pixel_parts = losses.reconstruction(outputs.reconstructed, batch.content)
        matching, matching_parts = losses.feature_matching(
            f_translated, f_classes, f_reconstructed, f_content
        )
        loss = self.adversarial * adversarial + self.reconstruction * pixels + self.features * matching
        return loss, parts | pixel_parts | matching_parts

    def content(
        self, generator: FewShotGenerator, batch: Batch, translated: Tensor
    ) -> tuple[Tensor | float, Parts]:
        """(loss, parts) of what the translations still say of their contents; nothing without its weight."""
        if not self.content_codes and not self.cycle:
            return 0.0, {}
        with torch.no_grad():
            target = generator.content_code(_encoded(batch))
        code = generator.content_code(translated)
        loss, parts = losses.content_consistency(code, target)
        loss = self.content_codes * loss
        if self.cycle:
            with torch.no_grad():
                own = generator.class_code(_own_class(batch))
            back, back_parts = losses.reconstruction(generator.decode(code, own), batch.content)
            loss, parts = loss + self.cycle * back, parts | {"cycle": back_parts["reconstruction"]}
        return loss, parts


def run_generator(generator: FewShotGenerator, batch: Batch) -> Outputs:
    """Encodes the content once, both kinds of class images as one batch, and decodes both as one batch.

    The reconstruction takes the class from the content image itself (FUNIT eq. 5). A class code can then hold
    what the image shows besides its class, and translations show it again; with `batch.same_class` the class
    comes from another image of the same class, and what the code says of that image's content only harms.
    With `batch.content_view` the content encoder sees other styles than the reconstruction must have, which
    then can only come from the class code.
    """
    content = generator.content_code(_encoded(batch))
    codes = generator.class_code(torch.cat([batch.classes, _own_class(batch)]))
    return Outputs(*generator.decode(torch.cat([content, content]), codes).chunk(2))


def _own_class(batch: Batch) -> Tensor:
    """What shows the class of the content images, (B, C, H, W)."""
    return batch.content if batch.same_class is None else batch.same_class


def _encoded(batch: Batch) -> Tensor:
    """What the content encoder gets, (B, C, H, W)."""
    return batch.content if batch.content_view is None else batch.content_view


def alternating_step(
    generator: FewShotGenerator,
    discriminator: PatchDiscriminator,
    batch: Batch,
    objective: Objective,
    backward: Callable[[Tensor], None],
    update: Callable[[str, Parts], None],
    micro_batches: int = 1,
    draws: Tensor | None = None,
) -> Parts:
    """One update of the discriminator, then one of the generator.

    `backward(loss)` accumulates gradients; `update("discriminator" or "generator", parts)` steps that
    optimizer and clears its gradients. `micro_batches` works the batch off in that many equal parts: the same
    update (of a penalty that does not depend on the batch size) for a fraction of the memory, and one more
    decoding. `draws`: those of the batch, (B, 4, ...), if the objective augments.

    Returns the parts of both losses, named "discriminator/..." and "generator/...", "loss" being the weighted
    total.
    """
    chunks = batch.split(micro_batches)
    views = [None] * micro_batches if draws is None else draws.chunk(micro_batches)
    outputs = [run_generator(generator, batch)] if micro_batches == 1 else None
    seen: list[Parts] = []
    for i, chunk in enumerate(chunks):
        with torch.no_grad():
            translated = outputs[i].translated if outputs else generator(_encoded(chunk), chunk.classes)
        loss, parts = objective.discriminator(discriminator, chunk, translated, views[i])
        backward(loss / micro_batches)
        seen.append({"loss": loss.detach()} | parts)
    parts_d = _named("discriminator", seen)
    update("discriminator", parts_d)
    seen = []
    with frozen(discriminator):
        for i, chunk in enumerate(chunks):
            made = outputs[i] if outputs else run_generator(generator, chunk)
            loss, parts = objective.generator(discriminator, chunk, made, views[i])
            kept, kept_parts = objective.content(generator, chunk, made.translated)
            loss = loss + kept
            backward(loss / micro_batches)
            seen.append({"loss": loss.detach()} | parts | kept_parts)
    parts_g = _named("generator", seen)
    update("generator", parts_g)
    return parts_d | parts_g


def _named(network: str, seen: list[Parts]) -> Parts:
    return {f"{network}/{name}": torch.stack([parts[name] for parts in seen]).mean() for name in seen[0]}


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradients of the network's weights inside; those that were trainable are again afterwards."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@torch.no_grad()
def average_(average: nn.Module, network: nn.Module, decay: float = 0.999) -> None:
    """average <- decay * average + (1 - decay) * network, weight by weight, in place."""
    averages: list[Tensor] = list(average.parameters())
    weights: list[Tensor] = list(network.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage] (no public one)
