"""Differentiable augmentation in FUNIT's step: whatever D sees goes through it, and the gradient too."""

import pytest
import torch

from lit_gen.augment.differentiable import DifferentiableAugment
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
from lit_gen.funit.step import Batch, Objective, alternating_step

NOTHING = DifferentiableAugment(color=False, translation=0.0, cutout=0.0)


class Black:
    """The discriminator sees nothing."""

    def draw(self, n, generator=None, device="cpu"):
        return torch.zeros(n, 1)

    def apply(self, images, draws):
        return images * 0


class Watching(DifferentiableAugment):
    def apply(self, images, draws):
        WATCHED.append((images.detach(), draws))
        return super().apply(images, draws)


WATCHED: list[tuple[torch.Tensor, torch.Tensor]] = []


def gradients(augment, micro_batches=1, penalty=True, **weights) -> dict[str, torch.Tensor]:
    """Each network's gradient in one step, as one vector."""
    torch.manual_seed(0)
    sizes = {"content_downs": 2, "class_downs": 2, "mlp_width": 5}
    generator = FewShotGenerator(width=3, code_size=4, **sizes).double()
    discriminator = PatchDiscriminator(3, width=3, num_res_blocks=4).double()
    images, labels = torch.rand(2, 4, 3, 16, 16).double() * 2 - 1, torch.randint(3, (2, 4))
    batch = Batch(images[0], labels[0], images[1], labels[1])
    objective = Objective(augment=augment, **weights, **({} if penalty else {"penalty": None}))
    networks, found = {"generator": generator, "discriminator": discriminator}, {}

    def update(which, parts):
        rows = [(torch.zeros_like(p) if p.grad is None else p.grad) for p in networks[which].parameters()]
        found[which] = torch.cat([g.flatten() for g in rows])
        networks[which].zero_grad()

    draws = objective.draw(4, torch.Generator().manual_seed(1), torch.device("cpu"))
    alternating_step(
        generator, discriminator, batch, objective, lambda x: x.backward(), update, micro_batches, draws
    )
    return found


def test_an_augmentation_that_changes_nothing_changes_nothing():
    with_it, without = gradients(NOTHING), gradients(None)
    assert all(torch.equal(with_it[k], without[k]) for k in without)
    assert not torch.equal(gradients(DifferentiableAugment())["generator"], without["generator"])


def test_the_discriminator_sees_nothing_else():
    """Blindfolded, it teaches the generator nothing: what is left is the gradient of the reconstruction."""
    blind = gradients(Black(), penalty=False)["generator"]
    alone = gradients(None, penalty=False, adversarial=0.0, features=0.0)["generator"]
    torch.testing.assert_close(blind, alone, rtol=0, atol=1e-12)
    assert blind.abs().max() > 1e-4


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_the_same_update(parts):
    whole, cut = (gradients(DifferentiableAugment(), n) for n in (1, parts))
    for which in whole:
        torch.testing.assert_close(whole[which], cut[which], rtol=0, atol=1e-10)


def test_in_the_generators_turn_pairs_are_seen_alike():
    """Class image and translation, content and reconstruction by the same draws; D's turn by its own."""
    WATCHED.clear()
    gradients(Watching())
    (_, real), (_, fake), (_, first), (_, second) = WATCHED
    assert torch.equal(first, second) and len(first) == 8
    assert len({row.numpy().tobytes() for row in torch.cat([real, fake, first])}) == 16
