"""BaseModule: gradients in every precision, compiled networks."""

import lightning.pytorch as pl
import pytest
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.plugins import MixedPrecision

from lit_gen import models
from lit_gen import module as base
from lit_gen.config.experiment import trainer_for
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate
from lit_gen.module import clip_gradients, compiles, lay_out_state

OFF = [f"~callbacks.{name}" for name in ("quality", "grid", "validation", "progress")]
SGD = (
    "model.optimizer._target_=torch.optim.SGD",
    "~model.optimizer.eps",
    "~model.optimizer.betas",
    "model.optimizer.lr=1.0",
    "model.optimizer.fused=true",
    "model/lr_schedule=constant",
    "trainer.max_steps=1",
    *OFF,
    "~callbacks.checkpoint",
)


class Watch(pl.Callback):
    """Remembers the weights at the start; `half`: trains as trainer.precision=16-mixed does on a GPU (on a
    CPU Lightning takes bfloat16 instead)."""

    def __init__(self, half: bool):
        self.half = half

    def setup(self, trainer, pl_module, stage):
        self.start = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        if self.half:
            trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")


class Moved:
    """How far the first step moved the weights, and the norm that was logged."""

    def __init__(self, fit, folder, precision, *options):
        watch = Watch(half=precision == "16-mixed")
        options = *SGD, f"trainer.precision={'32-true' if watch.half else precision}", *options
        module = fit(folder, *options, callbacks=[watch]).module
        self.step = torch.cat([p.detach().flatten() for p in module.parameters()]) - watch.start
        self.norm = module.results.logged["train/grad_norm"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_is_as_long_as_clipping_allows(fit, tmp_path, precision):
    """Of plain gradient descent at rate 1; the norm in the log is the one before clipping, unscaled."""
    clip = "trainer.gradient_clip_val=0.01"
    whole, moved = Moved(fit, tmp_path / "whole", precision), Moved(fit, tmp_path / "moved", precision, clip)
    assert whole.step.norm() == pytest.approx(whole.norm, rel=1e-3)
    assert moved.norm == pytest.approx(whole.norm, rel=1e-3)
    assert whole.norm > 0.1 and moved.step.norm() == pytest.approx(0.01, rel=1e-3)
    by_value = Moved(fit, tmp_path / "value", precision, clip, "+trainer.gradient_clip_algorithm=value")
    assert by_value.step.abs().max() == pytest.approx(0.01, rel=1e-3)


def test_clipping_leaves_short_gradients_alone():
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    weights[0].grad = torch.tensor([3.0, 0, 4])  # the other one has no gradient
    assert clip_gradients(weights, None) == 5 and clip_gradients(weights, 6) == 5
    assert weights[0].grad.tolist() == [3, 0, 4]
    assert clip_gradients(weights, 2.5) == 5
    torch.testing.assert_close(weights[0].grad, torch.tensor([1.5, 0, 2]))


def test_auto_compiles_on_cuda_where_the_compiler_can_work(monkeypatch, caplog):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compiles(option, cpu) for option in (True, False, "auto")] == [True, False, False]
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(base.shutil, "which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    assert compiles("auto", cuda) and not caplog.text
    capability[0] = (6, 1)
    assert not compiles("auto", cuda)
    assert "not compiled, for want of a GPU of compute capability 7: training" in caplog.text
    monkeypatch.setattr(base.shutil, "which", lambda name: None)
    assert not compiles("auto", cuda) and "want of a C compiler" in caplog.text
    assert compiles(True, cuda) and not compiles(False, cuda)


def test_compiling_changes_no_number_and_no_name(fit, tmp_path, monkeypatch):
    """A compiled run goes on uncompiled; a run that is loaded compiles nothing."""

    def compile_(self) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    options = "model.net.dropout=0", *OFF
    plain = fit(tmp_path / "plain", "trainer.max_steps=4", *options).module

    checkpoint = tmp_path / "half" / "checkpoints" / "last.ckpt"
    options = "callbacks.checkpoint.every=2", *options
    half = fit(tmp_path / "half", "trainer.max_steps=2", "model.compile=true", *options).module
    assert half.denoiser.net._compiled_call_impl is not None
    loaded, *_ = models.load(checkpoint, ema=False, device="cpu")
    assert loaded.denoiser.net._compiled_call_impl is None
    torch.testing.assert_close(loaded.state_dict(), half.state_dict(), rtol=0, atol=0)

    whole = fit(tmp_path / "whole", "trainer.max_steps=4", *options, checkpoint=checkpoint).module
    assert whole.denoiser.net._compiled_call_impl is None and whole.batches_seen == 4
    torch.testing.assert_close(whole.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_compiling_is_refused_for_what_it_cannot_do(compose):
    for options, message in {
        ("experiment=digits_edm", "model/loss=sliced", "model.compile=true"): "second derivative",
        ("model.compile=always",): "compile=always: give true, false or auto",
    }.items():
        with pytest.raises(InstantiationException, match=message):
            instantiate(compose(*options).model)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(fit, tmp_path, precision):
    with pytest.raises(ConfigError, match=f"precision={precision} keeps the weights .* Take bf16-mixed"):
        fit(tmp_path, f"trainer.precision={precision}")


def test_determinism_switches_the_choice_by_time_off(compose, tmp_path):
    for deterministic, benchmark in {"false": True, "true": False, "warn": False}.items():
        config = dict(compose("trainer=auto", f"trainer.deterministic={deterministic}").trainer)
        try:
            trainer_for(config, folder=tmp_path)
            assert torch.backends.cudnn.benchmark == benchmark
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = False


def test_moments_of_the_other_memory_layout_are_laid_out_as_the_weights():
    """Fused Adam goes on from a checkpoint of a channels_last network as from one of a contiguous network."""
    after = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        start, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
        saved = torch.nn.Parameter(start.clone(memory_format=layout))
        before = torch.optim.Adam([saved], lr=0.1, fused=True)
        saved.grad = gradient.clone(memory_format=layout)
        before.step()
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        optimizer.load_state_dict(before.state_dict())
        lay_out_state(optimizer)
        weight.grad = gradient.flip(0).clone()
        optimizer.step()
        after.append(weight.detach())
    torch.testing.assert_close(*after, rtol=0, atol=1e-6)
