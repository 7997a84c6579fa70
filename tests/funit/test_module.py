"""FUNITModule against the plain step, and against itself resumed, cut in parts and on two processes."""

import copy
import importlib.util
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf
from torch.multiprocessing import ProcessRaisedException

from lit_gen.callbacks import NaNGuard, NotFiniteError
from lit_gen.errors import ConfigError
from lit_gen.funit import gradients, translator
from lit_gen.funit.gradients import GradientMean
from lit_gen.funit.losses import Parts
from lit_gen.funit.module import FUNITModule
from lit_gen.funit.networks import ContentConditionedGenerator, FewShotGenerator
from lit_gen.funit.step import Batch, Objective, alternating_step, average_
from lit_gen.instantiate import instantiate

SCRIPT = Path(__file__).parent / "training.py"
spec = importlib.util.spec_from_file_location("funit_training", SCRIPT)
training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def plainly(module, steps: int) -> None:
    """Training without Lightning."""
    networks = {"generator": module.generator, "discriminator": module.discriminator}
    optimizers = {name: module.optimizer(network.parameters()) for name, network in networks.items()}

    def update(which: str, parts: Parts) -> None:
        optimizers[which].step()
        optimizers[which].zero_grad()

    for step in range(steps):
        batch = Batch(**training.batch(step))
        alternating_step(*networks.values(), batch, module.objective, lambda loss: loss.backward(), update)
        average_(module.generator_ema, module.generator, module.ema_decay)


def test_trains_like_the_plain_step():
    """The weights of both networks and of the average, bit by bit."""
    ours, plain = training.module(), training.module()
    training.fit(ours, 3)
    plainly(plain, 3)
    assert_equal(ours.state_dict(), plain.state_dict())
    moved = [
        not torch.equal(a, b)
        for a, b in zip(ours.generator.parameters(), ours.generator_ema.parameters(), strict=True)
    ]
    assert all(moved)


class Steps(pl.Callback):
    def __init__(self):
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.append((trainer.global_step, pl_module.batches_seen))


def test_one_batch_is_one_step(tmp_path):
    """`max_steps`, `global_step`, the batch count, the logger's axis and the checkpoint agree, with two
    optimizers."""
    steps, recorder = Steps(), training.Recorder()
    module = training.module(log_every=2)
    trainer = training.fit(module, 5, callbacks=[steps], logger=recorder)
    assert steps.seen == [(i, i) for i in range(1, 6)]
    assert trainer.global_step == module.batches_seen == 5
    assert list(recorder.history["train/generator/loss"]) == [2, 4]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["batches_seen"] == 5
    assert len(checkpoint["optimizer_states"]) == 2
    assert any(name.startswith("generator_ema.") for name in checkpoint["state_dict"])


def test_resume_is_bit_identical(tmp_path):
    """Weights, average, both optimizers and both schedules, stopped in the middle and started in a new
    module."""
    options = {"lr_schedule": lambda step: 1 / (1 + step)}
    whole = training.fit(training.module(**options), 4)
    training.fit(training.module(**options), 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = training.fit(training.module(**options), 4, resume=str(tmp_path / "half.ckpt"))
    assert_equal(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict())
    assert resumed.global_step == resumed.lightning_module.batches_seen == 4
    for a, b in zip(whole.optimizers, resumed.optimizers, strict=True):
        assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
        for i, state in a.state_dict()["state"].items():
            assert torch.equal(state["square_avg"], b.state_dict()["state"][i]["square_avg"])


def test_schedule_and_logged_numbers():
    """Both rates follow the schedule once a batch; parts, norms and the penalty's weight are logged."""
    recorder = training.Recorder()
    module = training.module(log_every=1, lr_schedule=lambda step: 1 / (1 + step))
    training.fit(module, 3, logger=recorder)
    for which in ("generator", "discriminator"):
        assert list(recorder.history[f"train/{which}/lr"].values()) == pytest.approx(
            [1e-3 / 2, 1e-3 / 3, 1e-3 / 4]
        )
        assert recorder.history[f"train/{which}/grad_norm"][1] > 0
    assert recorder.history["train/discriminator/penalty_weight"][1] == pytest.approx(10 / 64)
    parts = {name: values[2] for name, values in recorder.history.items()}
    total = parts["train/generator/adversarial"] + 0.1 * parts["train/generator/reconstruction"]
    total += parts["train/generator/content_features"] + parts["train/generator/class_features"]
    assert parts["train/generator/loss"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("fused", "precision"), [(False, "32-true"), (True, "32-true"), (True, "bf16-mixed")]
)
def test_gradient_clipping(fused, precision):
    """With SGD and rate 1 the first update of each network is as long as the clipped gradient; what is logged
    is its length before."""
    sgd = partial(torch.optim.SGD, lr=1.0, fused=fused)
    clipped, recorder = training.module(sgd, gradient_clip_val=1e-3, log_every=1), training.Recorder()
    clipped.float()
    before = {name: value.clone() for name, value in clipped.state_dict().items()}
    training.fit(clipped, 1, precision=precision, callbacks=[AsFloat()], logger=recorder)
    for network in ("generator", "discriminator"):
        change = [v - before[n] for n, v in clipped.state_dict().items() if n.startswith(f"{network}.")]
        assert torch.nn.utils.get_total_norm(change).item() == pytest.approx(1e-3, rel=5e-3)
        assert recorder.history[f"train/{network}/grad_norm"][1] > 0.01


def test_micro_batches_make_the_same_update():
    sgd = partial(torch.optim.SGD, lr=0.01)
    whole, cut = training.module(sgd), training.module(sgd, micro_batches=2)
    training.fit(whole, 2)
    trainer = training.fit(cut, 2)
    assert trainer.global_step == 2
    assert_equal(whole.state_dict(), cut.state_dict(), atol=1e-12)


def complete(finish):
    """`finish`, of a backward pass that has sent every bucket already."""

    def checked(self) -> None:
        assert len(self.under_way) == self.next == len(self.buckets) > 5
        finish(self)

    return checked


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
@pytest.mark.parametrize(("micro_batches", "kind"), [(1, FewShotGenerator), (2, ContentConditionedGenerator)])
def test_two_processes_equal_one(micro_batches, kind, monkeypatch):
    """DDP with each half of the batch on its own process, against one process with all of it. Gradients
    travel in several buckets, all of which are under way when the backward pass ends."""
    monkeypatch.setattr(gradients, "BUCKET", 4000)
    monkeypatch.setattr(GradientMean, "finish", complete(GradientMean.finish))
    sgd = partial(torch.optim.SGD, lr=0.01)  # gradients that differ would show in proportion
    single = training.module(sgd, kind)
    shared = training.module(sgd, kind, micro_batches=micro_batches)
    training.fit(single, 3)
    # The options of conf/trainer/ddp.yaml.
    strategy = DDPStrategy(start_method="fork", broadcast_buffers=False, gradient_as_bucket_view=True)
    trainer = training.fit(shared, 3, devices=2, strategy=strategy)
    assert trainer.world_size == 2
    assert_equal(shared.state_dict(), single.state_dict(), atol=1e-10)


def test_translation_uses_the_average():
    """K images, their code, and one code per content image say the same; bytes come out."""
    module = training.module()
    training.fit(module, 2)
    content, shots = training.batch(0)["content"], training.batch(1)["classes"]
    codes = module.generator_ema.class_code(shots)
    translated = module.translate(content, shots)
    assert translated.dtype == torch.uint8
    torch.testing.assert_close(module.class_code(shots), codes.mean(0))
    assert torch.equal(translated, module.translate(content, codes.mean(0)))
    each = module.translate(content, shots[:, None])
    assert torch.equal(each, module.translate(content, codes))
    expected = module.generator_ema(content, shots) * 127.5 + 128
    assert torch.equal(each, expected.clamp(0, 255).to(torch.uint8))


def test_interpolation_ends_at_its_classes():
    module = training.module()
    content, shots = training.batch(0)["content"], training.batch(1)["classes"]
    first, second = module.generator_ema.class_code(shots[:2])
    way = module.interpolate(content, first, second, steps=5)
    assert torch.equal(way[:, 0], module.translate(content, first))
    assert torch.equal(way[:, -1], module.translate(content, second))
    assert torch.equal(way[:, 2], module.translate(content, (first + second) / 2))
    with pytest.raises(ConfigError, match="interpolate=1"):
        module.interpolate(content, first, second, steps=1)


def test_adaptation_steps_down_the_reconstruction_of_the_class_images():
    """Of the code alone: no step is the mean code, and no weight moves; what `augment` shows is encoded."""
    generator = training.module().generator_ema
    images = training.batch(1)["classes"]
    before = copy.deepcopy(generator.state_dict())

    def error(code, content=images):
        code = code.expand(len(images), -1)
        return (generator.decode(generator.content_code(content), code) - images).abs().mean().item()

    codes = [translator.adapted_code(generator, images, steps) for steps in (0, 5, 50)]
    assert torch.equal(codes[0], translator.class_code(generator, images))
    assert error(codes[2]) < error(codes[1]) < error(codes[0])
    assert all(torch.equal(before[name], weight) for name, weight in generator.state_dict().items())
    flip = lambda image, random: image.flip(-1)  # noqa: E731
    flipped = translator.adapted_code(generator, images, 50, flip)
    assert error(flipped, images.flip(-1)) < error(codes[0], images.flip(-1))
    assert not torch.equal(flipped, codes[2]) and not flipped.requires_grad
    with pytest.raises(ConfigError, match="adapt=-1"):
        translator.adapted_code(generator, images, -1)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ("generator.decoder.out.bias", r"discriminator/fake: nan.*generator/reconstruction: nan"),
        ("discriminator.stem.bias", r"discriminator/real: nan.*generator/adversarial: nan"),
    ],
)
def test_nan_stops_with_the_parts_named(weight, named, tmp_path):
    module = training.module()
    with torch.no_grad():
        module.get_parameter(weight)[0] = torch.nan
    with pytest.raises(NotFiniteError, match=rf"batch 1 .*{named}"):
        training.fit(module, 2, callbacks=[NaNGuard()], default_root_dir=tmp_path)


def nan_penalty(logits: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, Parts]:
    penalty = logits.sum() * torch.nan
    return penalty, {"penalty": penalty.detach()}


@pytest.mark.parametrize(
    ("objective", "named", "sound"),
    [
        (Objective(penalty=nan_penalty), r"discriminator/penalty: nan", "discriminator/real"),
        (Objective(features=torch.inf), r"generator/loss: inf", "discriminator/loss"),
    ],
)
def test_one_loss_that_is_not_finite_is_enough(objective, named, sound, tmp_path):
    """D's alone, by its penalty; G's alone, by an infinite weight. Parts that are finite read so."""
    module = training.module(objective=objective)
    with pytest.raises(NotFiniteError, match=named) as error:
        training.fit(module, 2, callbacks=[NaNGuard()], default_root_dir=tmp_path)
    assert re.search(rf"{sound}: -?\d", str(error.value))


def test_refuses_with_value_and_remedy():
    with pytest.raises(ConfigError, match=r"ema_decay=1.0"):
        training.module(ema_decay=1.0)
    with pytest.raises(ConfigError, match=r"micro_batches=0"):
        training.module(micro_batches=0)
    with pytest.raises(ConfigError, match=r"gradient_clip_val=-1"):
        training.module(gradient_clip_val=-1)
    with pytest.raises(ConfigError, match=r"precision=16-true.*bf16-mixed"):
        training.fit(training.module(), 1, precision="16-true")
    strategy = DDPStrategy(start_method="fork", static_graph=True)
    with pytest.raises(ProcessRaisedException, match=r"static_graph=true: the turns"):
        training.fit(training.module(), 1, devices=2, strategy=strategy)
    few = training.module()
    few.discriminator.num_classes = 1
    with pytest.raises(ConfigError, match=r"label is 2, the discriminator has 1 classes"):
        training.fit(few, 1)


def test_deterministic_kernels_are_refused_on_cuda(monkeypatch):
    """There the backward pass of a reflected border has none; as a warning it may go on."""
    module, strategy = training.module(), SingleDeviceStrategy(torch.device("cpu"))
    stub = SimpleNamespace(precision="32-true", strategy=strategy)
    monkeypatch.setattr(FUNITModule, "trainer", property(lambda self: stub))
    monkeypatch.setattr(FUNITModule, "device", torch.device("cuda"))
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        module.on_fit_start()
        torch.use_deterministic_algorithms(True)
        with pytest.raises(ConfigError, match=r"deterministic=true.*deterministic=warn"):
            module.on_fit_start()
    finally:
        torch.use_deterministic_algorithms(False)


def test_bfloat16_training_follows_float32():
    """Three steps with autocast move the weights where float32 moves them."""

    def moved(precision: str) -> torch.Tensor:
        module = training.module(partial(torch.optim.SGD, lr=1e-3))
        module.float()
        before = torch.cat([p.detach().flatten() for p in module.parameters()])
        training.fit(module, 3, precision=precision, callbacks=[AsFloat()])
        return torch.cat([p.detach().flatten() for p in module.parameters()]) - before

    exact, rounded = moved("32-true"), moved("bf16-mixed")
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.95


class AsFloat(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        batch |= {name: value.float() for name, value in batch.items() if value.is_floating_point()}


@pytest.mark.slow
def test_compiled_training_is_the_same(monkeypatch):
    """The option compiles every part, each as one graph, and changes no number."""
    calls = []

    def compile_(self) -> None:
        calls.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    compiled, plain = training.module(compile=True), training.module(compile="auto")
    training.fit(compiled, 2)
    training.fit(plain, 2)
    assert sorted(calls) == ["ClassEncoder", "ContentEncoder", "Decoder", "MLP", "PatchDiscriminator"]
    assert_equal(compiled.state_dict(), plain.state_dict(), atol=1e-9)


def test_config_is_the_official_one():
    """conf/model/funit.yaml builds the module, at the official sizes, with the code's own defaults."""
    config = OmegaConf.load(Path(__file__).parents[2] / "conf" / "model" / "funit.yaml")
    root = OmegaConf.create(
        {"model": config, "data": {"channels": 3, "num_classes": 119}, "seed": 3, "log_every": 7}
    )
    with torch.device("meta"):
        module = instantiate(OmegaConf.to_container(root, resolve=True)["model"])
    assert sum(p.numel() for p in module.generator.parameters()) == 29_866_435
    assert sum(p.numel() for p in module.discriminator.parameters()) == 54_252_599
    assert module.objective.penalty.keywords == {"weight": 10 / 64}
    defaults = Objective()
    for name in ("adversarial", "reconstruction", "features"):
        assert getattr(module.objective, name) == getattr(defaults, name)
    optimizer = module.configure_optimizers()[0][0]
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert optimizer.defaults["lr"] == optimizer.defaults["weight_decay"] == 1e-4
    assert (module.ema_decay, module.seed, module.log_every) == (0.999, 3, 7)
