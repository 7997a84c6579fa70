"""The lean step against the plain one: same gradients, same weights, less work."""

import copy
import functools

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.funit import losses
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
from lit_gen.funit.step import Batch, Objective, Outputs, alternating_step, average_, frozen


class Training:
    def __init__(self, batch_size: int = 4, **options):
        torch.manual_seed(0)
        self.generator = FewShotGenerator(
            width=3, code_size=4, content_downs=2, class_downs=2, mlp_width=5
        ).double()
        self.discriminator = PatchDiscriminator(3, width=3, num_res_blocks=4).double()
        images = torch.rand(2, batch_size, 3, 16, 16, dtype=torch.float64) * 2 - 1
        labels = torch.randint(3, (2, batch_size))
        self.batch = Batch(images[0], labels[0], images[1], labels[1])
        self.objective = Objective(**options)
        self.optimizers = {
            name: torch.optim.SGD(getattr(self, name).parameters(), lr=0.01)
            for name in ("generator", "discriminator")
        }
        self.gradients: dict[str, list[torch.Tensor]] = {}

    def update(self, which: str, parts: losses.Parts) -> None:
        self.gradients[which] = [p.grad.clone() for p in getattr(self, which).parameters()]
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def step(self, micro_batches: int = 1) -> losses.Parts:
        networks = self.generator, self.discriminator
        return alternating_step(
            *networks, self.batch, self.objective, lambda loss: loss.backward(), self.update, micro_batches
        )

    def plainly(self) -> None:
        """Each pass on its own, with gradients everywhere, as the paper's equations read."""
        g, d, (xa, la, xb, lb, own, seen) = self.generator, self.discriminator, self.batch
        seen = xa if seen is None else seen
        xb = xb.clone().requires_grad_()
        real, _ = d(xb, lb)
        fake, _ = d(g(seen, xb).detach(), lb)
        penalty, _ = losses.gradient_penalty(real, xb)
        ((1 - real).relu().mean() + (1 + fake).relu().mean() + penalty).backward()
        g.zero_grad()
        self.update("discriminator", {})
        xb = self.batch.classes
        xt, xr = g(seen, xb), g(seen, xa if own is None else own)
        (fake_t, f_t), (fake_r, f_r), (_, f_b), (_, f_a) = d(xt, lb), d(xr, la), d(xb, lb), d(xa, la)
        adversarial = 0.5 * (-fake_t.mean() - fake_r.mean())
        matching = (f_t.mean((2, 3)) - f_b.mean((2, 3))).abs().mean()
        matching = matching + (f_r.mean((2, 3)) - f_a.mean((2, 3))).abs().mean()
        kept = (g.content_code(xt) - g.content_code(seen).detach()).abs().mean()
        kept = self.objective.content_codes * kept
        back = g.decode(g.content_code(xt), g.class_code(xa if own is None else own).detach())
        kept = kept + self.objective.cycle * (back - xa).abs().mean()
        (adversarial + 0.1 * (xr - xa).abs().mean() + matching + kept).backward()
        d.zero_grad()
        self.update("generator", {})


def assert_same(a: Training, b: Training, atol: float) -> None:
    for which in ("discriminator", "generator"):
        for x, y in zip(a.gradients[which], b.gradients[which], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_lean_step_has_the_gradients_of_the_plain_one():
    lean, plain = Training(), Training()
    lean.step()
    plain.plainly()
    assert_same(lean, plain, 1e-12)
    assert all(p.requires_grad and p.grad is None for p in lean.discriminator.parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_content_codes_of_translations_are_held_to_those_of_their_contents(parts):
    lean, plain = Training(content_codes=0.7), Training(content_codes=0.7)
    seen = torch.rand_like(lean.batch.content)
    lean.batch, plain.batch = lean.batch._replace(content_view=seen), plain.batch._replace(content_view=seen)
    logged = lean.step(parts)
    plain.plainly()
    assert_same(lean, plain, 1e-12)
    assert logged["generator/content_codes"] > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_translations_are_translated_back(parts):
    lean, plain = Training(cycle=0.7), Training(cycle=0.7)
    own = torch.rand_like(lean.batch.content)
    lean.batch = plain.batch = lean.batch._replace(same_class=own, content_view=own.flip(0))
    logged = lean.step(parts)
    plain.plainly()
    assert_same(lean, plain, 1e-12)
    assert logged["generator/cycle"] > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_what_the_content_encoder_sees(parts):
    """`content_view` stands in for the content image in the content encoder, and nowhere else."""
    lean, plain = Training(), Training()
    seen = torch.rand_like(lean.batch.content)
    lean.batch, plain.batch = lean.batch._replace(content_view=seen), plain.batch._replace(content_view=seen)
    lean.step(parts)
    plain.plainly()
    assert_same(lean, plain, 1e-12)


@pytest.mark.parametrize("parts", [1, 2])
def test_reconstruction_from_another_image_of_the_class(parts):
    """`same_class` stands in for the content image as the reconstruction's class image, and nowhere else."""
    lean, plain = Training(), Training()
    own = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    lean.batch = plain.batch = lean.batch._replace(same_class=own)
    lean.step(parts)
    plain.plainly()
    assert_same(lean, plain, 1e-12)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_the_same_update(parts):
    whole, cut = Training(), Training()
    a, b = whole.step(), cut.step(micro_batches=parts)
    assert_same(whole, cut, 1e-12)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12, msg=name)


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"batch of 4.*3 equal parts"):
        Training().step(micro_batches=3)


def test_generator_turn_leaves_the_discriminator_out():
    """No weight of D gets a gradient in G's turn, and G none in D's."""
    training = Training()
    seen = {}

    def update(which: str, parts: losses.Parts) -> None:
        seen[which] = {
            name: sum(p.grad is not None for p in getattr(training, name).parameters())
            for name in ("generator", "discriminator")
        }
        training.update(which, parts)

    networks = training.generator, training.discriminator
    alternating_step(*networks, training.batch, training.objective, lambda loss: loss.backward(), update)
    every = {name: len(list(getattr(training, name).parameters())) for name in ("generator", "discriminator")}
    assert seen["discriminator"] == {"generator": 0, "discriminator": every["discriminator"]}
    assert seen["generator"] == {"generator": every["generator"], "discriminator": 0}


def test_each_turn_runs_each_network_once():
    """One pass of each encoder and of the decoder an iteration; two of D with a graph of its weights, one
    without."""
    training = Training()
    calls: list[tuple[str, int, bool]] = []
    g, d = training.generator, training.discriminator
    for name, module in (
        ("content", g.content_encoder),
        ("class", g.class_encoder),
        ("decoder", g.decoder),
        ("d", d.stem),
    ):
        module.register_forward_hook(
            lambda m, args, out, name=name: calls.append((name, len(args[0]), out.requires_grad))
        )
    training.step()
    assert sorted(calls) == [
        ("class", 8, True),
        ("content", 4, True),
        ("d", 4, True),  # real class images
        ("d", 4, True),  # translations
        ("d", 8, False),  # real images in G's turn
        ("d", 8, True),  # translations and reconstructions
        ("decoder", 8, True),
    ]


def test_weights_and_penalty_of_the_objective():
    training = Training(adversarial=2.0, reconstruction=3.0, features=5.0, penalty=None)
    d, batch = training.discriminator, training.batch
    translated = torch.zeros_like(batch.content)
    loss, parts = training.objective.discriminator(d, batch, translated)
    torch.testing.assert_close(loss, 2 * (parts["real"] + parts["fake"]))
    assert "penalty" not in parts
    outputs = (
        training.generator(batch.content, batch.classes),
        training.generator(batch.content, batch.content),
    )
    loss, parts = training.objective.generator(d, batch, Outputs(*outputs))
    features = parts["content_features"] + parts["class_features"]
    torch.testing.assert_close(loss, 2 * parts["adversarial"] + 3 * parts["reconstruction"] + 5 * features)
    doubled = Training(penalty=functools.partial(losses.gradient_penalty, weight=20 / 64))
    single = Training()
    a, _pa = doubled.objective.discriminator(doubled.discriminator, batch, translated)
    b, pb = single.objective.discriminator(single.discriminator, batch, translated)
    torch.testing.assert_close(a - b, 10 / 64 * pb["penalty"])


def test_compiled_discriminator_has_its_penalty():
    """Graphs of AOT autograd cannot be differentiated twice; the pass that must be stays eager, the other
    does not."""
    training = Training()
    discriminator = PatchDiscriminator(3, width=2, num_res_blocks=2).double()
    expected, _ = training.objective.discriminator(discriminator, training.batch, training.batch.content)
    discriminator._compiled_call_impl = torch.compile(
        discriminator._call_impl, backend="aot_eager", fullgraph=True
    )
    loss, _ = training.objective.discriminator(discriminator, training.batch, training.batch.content)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    images = training.batch.classes.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        losses.gradient_penalty(discriminator(images, training.batch.class_label)[0], images)[0].backward()


def test_average():
    a, b = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    before = copy.deepcopy(a)
    for _ in range(3):
        average_(a, b, 0.9)
    torch.testing.assert_close(a.weight, 0.9**3 * before.weight + (1 - 0.9**3) * b.weight)


def test_frozen_restores_after_an_error():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(KeyError), frozen(layer):
        assert not any(p.requires_grad for p in layer.parameters())
        raise KeyError
    assert layer.weight.requires_grad and not layer.bias.requires_grad
