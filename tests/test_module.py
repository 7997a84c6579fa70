"""BaseModule: gradients in every precision, with an optimizer that unscales within its step."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lit_gen.module import clip_gradients

SGD = (
    "model.optimizer._target_=torch.optim.SGD",
    "~model.optimizer.eps",
    "~model.optimizer.betas",
    "model.optimizer.lr=1.0",
    "model.optimizer.fused=true",
    "model/schedule=constant",
    "trainer.max_steps=1",
    *(f"~callbacks.{name}" for name in ("quality", "grid", "validation", "checkpoint", "progress")),
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
        self.norm = module.last_scalars["train/grad_norm"]


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
