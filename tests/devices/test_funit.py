"""FUNIT on a GPU: both turns of a step and what translates run under CUDA's autocast, and the host never
waits."""

from contextlib import nullcontext

import pytest
import torch

from lit_gen.augment.differentiable import DifferentiableAugment
from lit_gen.funit import losses, translator
from lit_gen.funit.networks import ContentConditionedGenerator, FewShotGenerator, PatchDiscriminator
from lit_gen.funit.step import Batch, Objective, alternating_step, average_

B, CLASSES = 4, 3
OBJECTIVES = {
    "gradient penalty": Objective(),
    "official penalty": Objective(penalty=losses.official_gradient_penalty),
    "no penalty": Objective(penalty=None),
    "augmented": Objective(augment=DifferentiableAugment()),
    "content codes": Objective(content_codes=1.0),
    "cycle": Objective(cycle=1.0),
}


@pytest.fixture
def networks(cuda):
    generator = FewShotGenerator(width=4, code_size=4, content_downs=2, class_downs=2, mlp_width=8)
    return cuda.put(generator), cuda.put(PatchDiscriminator(CLASSES, width=4, num_res_blocks=4))


def batch(cuda, **more):
    images, labels = torch.rand(2, B, 3, 16, 16) * 2 - 1, torch.randint(CLASSES, (2, B))
    return cuda.put(Batch(images[0], labels[0], images[1], labels[1], **more))


def trained_without_waiting(cuda, networks, data, objective, micro_batches=1, bf16=True, steps=1):
    generator, discriminator = networks
    optimizers = {
        "generator": torch.optim.RMSprop(generator.parameters(), lr=1e-3),
        "discriminator": torch.optim.RMSprop(discriminator.parameters(), lr=1e-3),
    }

    def update(which, parts):
        optimizers[which].step()
        optimizers[which].zero_grad()

    for _ in range(2 if cuda.real else steps):
        with cuda.counting() as waits:
            draws = objective.draw(B, None, cuda.device)
            with cuda.autocast() if bf16 else nullcontext():
                parts = alternating_step(
                    generator,
                    discriminator,
                    data,
                    objective,
                    torch.Tensor.backward,
                    update,
                    micro_batches,
                    draws,
                )
            average_(generator, generator)
    assert waits == []
    assert {p.dtype for p in parts.values()} == {torch.float32}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_step(cuda, networks, name):
    twice = 2 if name == "gradient penalty" else 1  # the second finds what the optimizers keep
    trained_without_waiting(cuda, networks, batch(cuda), OBJECTIVES[name], steps=twice)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_step_in_float32(cuda, networks, name):
    trained_without_waiting(cuda, networks, batch(cuda), OBJECTIVES[name], bf16=False)


def test_step_in_parts_with_other_images(cuda, networks):
    more = {"same_class": torch.rand(B, 3, 16, 16), "content_view": torch.rand(B, 3, 16, 16)}
    trained_without_waiting(cuda, networks, batch(cuda, **more), Objective(), micro_batches=2)


def test_translating(cuda, networks):
    generator, images = networks[0].eval(), cuda.put(torch.rand(B, 3, 16, 16) * 2 - 1)
    with cuda.counting() as waits, cuda.autocast():
        translator.translate(generator, images, images)
        translator.interpolate(generator, images[:1], images, images, 3)
        translator.adapted_code(generator, images, 2)
    assert waits == []


def test_step_and_translation_conditioned_on_the_content(cuda, networks):
    options = {"width": 4, "code_size": 4, "content_downs": 2, "class_downs": 2, "mlp_width": 8}
    generator = cuda.put(ContentConditionedGenerator(**options, style_bias=3, adain_ups=True))
    trained_without_waiting(cuda, (generator, networks[1]), batch(cuda), Objective(cycle=1.0))
    test_translating(cuda, (generator,))
