"""Which precision a network computes in while a sampler, a solver or a likelihood calls it."""

from functools import partial

import pytest
import torch
from torch import nn

from lit_gen.errors import ConfigError
from lit_gen.rng import PerSample, keyed_generator
from lit_gen.score.denoiser import Denoiser, network_precision
from lit_gen.score.guidance import Guidance
from lit_gen.score.likelihood import log_likelihood, variational_bound
from lit_gen.score.precondition import EDMPrecondition, PredictNoise, StepIndex
from lit_gen.score.restoration import Inpainting, box_mask, pigdm
from lit_gen.score.samplers import ddim, encode, heun, predictor_corrector, rk45
from lit_gen.score.sde import EDM, DiscreteVP, linear_betas

BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
BACKENDS += (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)


def switches() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


class Watched(nn.Module):
    """A convolution that notes the precision it is called in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.seen = nn.Conv2d(1, 1, 3, padding=1), []

    def forward(self, x, noise_label, label=None, augment_label=None):
        y = self.conv(x)
        self.seen.append((x.dtype, noise_label.dtype, y.dtype, switches()))
        return y


def denoiser(discrete: bool = False) -> Denoiser:
    if discrete:
        return Denoiser(Watched(), DiscreteVP(linear_betas(40)), PredictNoise(StepIndex()))
    return Denoiser(Watched(), EDM(0.01, 40.0), EDMPrecondition())


def images() -> torch.Tensor:
    return 0.3 * torch.randn(2, 1, 4, 4, generator=keyed_generator("precision"))


EXACT = {
    "rk45": lambda d, x: rk45(d, x, rtol=0.1, atol=0.1),
    "encode": lambda d, x: encode(d, x, rtol=0.1, atol=0.1),
    "log_likelihood": lambda d, x: log_likelihood(d, x, rtol=0.1, atol=0.1),
    "variational_bound": lambda d, x: variational_bound(d, x, num_steps=3),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_promised_to_a_tolerance_runs_in_full_float32(name):
    d = denoiser(discrete=name == "variational_bound")
    chosen = switches()
    assert chosen != ["ieee"] * 4  # cuDNN's default is TF32
    EXACT[name](d, images())
    assert all(seen[3] == ["ieee"] * 4 for seen in d.net.seen) and switches() == chosen
    d.net.seen = None  # the network fails
    with pytest.raises(AttributeError):
        EXACT[name](d, images())
    assert switches() == chosen


def test_other_samplers_leave_the_switches_alone():
    d = denoiser()
    heun(d, images(), num_steps=2)
    assert all(seen[3] == switches() for seen in d.net.seen)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_the_networks_alone(precision, dtype):
    """Of the guide's network too, and of what is wrapped around them; states and results stay float64."""
    d, states = Guidance(denoiser(), denoiser(), 2.0), []
    samplers = {
        "heun": partial(heun, num_steps=3, S_churn=1.0),
        "ddim": partial(ddim, num_steps=3, eta=1.0),
        "pc": partial(predictor_corrector, num_steps=3),
        "restoration": lambda d, x, **o: pigdm(d, x, mask, mask(images()), num_steps=3, **o),
    }
    mask = Inpainting(box_mask(4, 4, 1, 1, 2, 2))
    for sampler in samplers.values():
        with network_precision(d, precision):
            out = sampler(
                d,
                40 * images(),
                generator=PerSample.keyed(0, range(2)),
                trace=lambda step, x_t, x0_hat: states.append((x_t.dtype, x0_hat.dtype)),
            )
        assert out.dtype == torch.float64 and out.isfinite().all()
    assert set(states) == {(torch.float64, torch.float64)}
    for net in (d.denoiser.net, d.guide.net):
        assert {seen[:3] for seen in net.seen} == {(torch.float32, torch.float32, dtype)}
        net.seen.clear()
    heun(d, images(), num_steps=2)
    assert {seen[2] for seen in d.denoiser.net.seen} == {torch.float32}  # put back


def test_a_solver_refuses_half_precision_and_there_are_three():
    d = denoiser()
    with network_precision(d, "bf16"), pytest.raises(ConfigError, match="rk45 solves to a tolerance below"):
        rk45(d, images())
    with pytest.raises(ConfigError, match="precision=bf8: must be one of float32, bf16, fp16"):
        network_precision(d, "bf8").__enter__()


def test_samples_in_bf16_are_those_of_float32_to_a_few_grey_levels(fit, tmp_path):
    """bfloat16 keeps 8 bits: the mean difference is below one level of 256, the state never the network's."""
    alone = [f"~callbacks.{name}" for name in ("quality", "grid", "validation")]
    options = [
        "experiment=digits_edm",
        "trainer.max_steps=60",
        "data.batch_size=32",
        "sampler.num_steps=8",
        *alone,
    ]
    module = fit(tmp_path, *options, "callbacks.checkpoint.monitor=null").module
    full = module.sample(range(32))
    module.sampling_precision = "bf16"
    half = module.sample(range(32))
    assert torch.equal(module.sample(range(32)), half)
    difference = (half.float() - full.float()).abs()
    assert 0 < difference.mean() < 1 and difference.max() <= 16
    module.sampling_precision = "float32"
    assert torch.equal(module.sample(range(32)), full)
    with pytest.raises(ConfigError, match="rk45 solves to a tolerance below"):  # before a training begins
        module.sampling_precision = "bf16"
        module.check(rk45)
