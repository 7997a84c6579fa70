"""Score models on a GPU: every network, process, preconditioning, loss, sampler, guidance, and restoration
runs under CUDA's autocast without mixing devices, and the host never waits."""

import sys
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_gen.augment.conditional import ConditionalAugment
from lit_gen.callbacks import EMA, HalfLife, NaNGuard, Power
from lit_gen.rng import PerSample
from lit_gen.score import likelihood, losses, precondition, restoration, samplers, sde
from lit_gen.score.classifier import ClassifierModule
from lit_gen.score.denoiser import ClippedDenoiser, CountingDenoiser, Denoiser, ReparameterizedDenoiser
from lit_gen.score.fewstep.consistency import ConsistencyLoss, Stages
from lit_gen.score.fewstep.meanflow import MeanFlowDenoiser, MeanFlowLoss
from lit_gen.score.fewstep.scm import ContinuousConsistencyLoss
from lit_gen.score.guidance import ClassifierGuidance, Guidance, classifier_free_guidance
from lit_gen.score.module import ScoreModule
from lit_gen.score.networks.adm import ADM
from lit_gen.score.networks.classifier import NoisyClassifier
from lit_gen.score.networks.ddpm import DDPM
from lit_gen.score.networks.dit import DiT
from lit_gen.score.networks.edm2 import EDM2
from lit_gen.score.networks.ncsn import NCSN
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.networks.ncsnv2 import NCSNv2
from lit_gen.score.networks.uvit import UViT

SHAPE, B = (3, 16, 16), 4


class TinyNet(nn.Module):
    """The least that a denoiser calls, where the network is not what is tested."""

    def __init__(self, num_classes: int = 0, augment_dim: int = 0):
        super().__init__()
        self.conv, self.level = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(1, 3)
        self.num_classes, self.rows = num_classes, nn.Linear(max(num_classes + augment_dim, 1), 3)

    def forward(self, x, noise_label, label=None, augment_label=None):
        if label is not None and label.ndim == 1:
            label = label[:, None] == torch.arange(self.num_classes, device=x.device)
        told = [rows.to(x.dtype) for rows in (label, augment_label) if rows is not None]
        row = torch.cat(told, 1) if told else x.new_zeros(len(x), self.rows.in_features)
        scale = self.level(noise_label[:, None].to(x)) + self.rows(row)
        return self.conv(x).tanh() + scale[:, :, None, None]


UNET = {"image_size": 16, "channels": 3, "base_channels": 16, "channel_mult": [1, 2]}
UNET |= {"num_blocks": 1, "attention_resolutions": [8]}
FOURIER = {"embedding": "fourier", "fir": [1, 3, 3, 1]}
NETWORKS = {
    "tiny": TinyNet,
    "ddpmpp": partial(NCSNpp, **UNET),
    "ncsnpp": partial(NCSNpp, **UNET, **FOURIER, input_pyramid="residual"),
    "ncsnpp256": partial(NCSNpp, **UNET, **FOURIER, input_pyramid="skip", output_pyramid="skip"),
    "ncsnpp strided": partial(NCSNpp, **UNET, input_pyramid="strided"),
    "two times": partial(NCSNpp, **UNET, second_time="added"),
    "ddpm": partial(DDPM, **UNET),
    "adm": partial(ADM, **UNET),
    "edm2": partial(EDM2, **UNET),
    "uvit": partial(UViT, 16, 3, 4, 16, 4, 2),
    "dit": partial(DiT, 16, 3, 4, 16, 2, 2),
    "ncsn": partial(NCSN, 16, 3, 16),
    "ncsnv2": partial(NCSNv2, 16, 3, 16),
}
DDPM_STEPS = sde.DiscreteVP(sde.linear_betas())
PROCESSES = {
    "edm": sde.EDM(),
    "ve": sde.VE(),
    "vp": sde.VP(),
    "subvp": sde.SubVP(),
    "flow": sde.Flow(),
    "ddpm": DDPM_STEPS,
    "cosine": sde.DiscreteVP(sde.cosine_betas()),
}
ROWS = {
    "edm": precondition.EDMPrecondition(),
    "noise": precondition.PredictNoise(),
    "noise, step index": precondition.PredictNoise(precondition.StepIndex()),
    "noise, nearest step": precondition.PredictNoise(precondition.StepIndex(True)),
    "scaled score": precondition.PredictScaledScore(),
    "score": precondition.PredictScore(),
    "score, level index": precondition.PredictScore(precondition.LevelIndex(10, 1.0, 0.01)),
    "image": precondition.PredictImage(),
    "velocity": precondition.PredictVelocity(),
    "flow": precondition.PredictFlow(),
}
LOSSES = {
    "edm": losses.edm_loss(),
    "snr": losses.DenoisingLoss(losses.UniformTime(), losses.snr),
    "min-snr": losses.DenoisingLoss(losses.UniformStep(), losses.MinSNR()),
    "likelihood": losses.DenoisingLoss(losses.UniformTime(), losses.likelihood),
    "velocity": losses.DenoisingLoss(losses.UniformTime(), losses.velocity),
    "flow": losses.DenoisingLoss(losses.LogitNormal(), losses.flow),
    "variance": losses.DenoisingLoss(losses.UniformTime(), losses.variance),
    "constant": losses.DenoisingLoss(losses.UniformTime(), losses.constant, losses.half_sum_of_pixels),
    "uncertainty": losses.UncertaintyLoss(losses.edm_loss()),
    "consistency": ConsistencyLoss(losses.TruncatedLogNormal(), Stages(None, q=4.0)),
    "distillation": ConsistencyLoss(losses.LogNormal(), Stages(None, q=4.0), distill=True),
    "sCT": ContinuousConsistencyLoss(losses.TruncatedLogNormal()),
    "sCD": ContinuousConsistencyLoss(losses.TruncatedLogNormal(), distill=True),
    "meanflow": MeanFlowLoss(),
    "sliced": losses.SlicedScoreLoss(losses.UniformTime()),
    "sliced, not variance-reduced": losses.SlicedScoreLoss(losses.UniformTime(), variance_reduced=False),
}
EVERYTHING = ConditionalAugment(
    p=1, rotate_int=1, translate_int=1, brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1
)


def on(cuda, module):
    """The module as Lightning would have it on the device, its trainer a stand-in of one process."""
    cuda.put(module)
    module._device = cuda.device
    module.trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        barebones=False,
    )
    module.optimizers = lambda: SimpleNamespace(param_groups=[{"lr": 1.0}])
    return module


def score_module(cuda, net="tiny", process="edm", row="edm", loss="edm", **options):
    names = {"num_classes": options.get("num_classes", 0)} if options.get("num_classes") else {}
    if options.get("augment") is not None:
        names["augment_dim"] = options["augment"].label_dim
    made = ScoreModule(
        NETWORKS[net](**names),
        PROCESSES[process],
        ROWS[row],
        LOSSES[loss],
        partial(torch.optim.Adam, lr=1e-3),
        partial(samplers.heun, num_steps=3),
        SHAPE,
        **options,
    )
    return on(cuda, made)


def batch(cuda, num_classes=0):
    labels = torch.arange(B) % max(num_classes, 1)
    return cuda.put({"image": torch.rand(B, *SHAPE) * 2 - 1, "label": labels, "index": torch.arange(B)})


def trained_without_waiting(cuda, module, data) -> None:
    """Two training steps in bfloat16; the host may wait in the first, which fills caches."""
    for _ in range(2):
        with cuda.counting() as waits:
            with cuda.autocast():
                loss = module.training_step(data, 0)
            loss.backward()
        assert loss.dtype in (torch.float32, torch.float64)
    assert waits == []
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("net", [net for net in NETWORKS if net != "two times"])
def test_networks(cuda, net):
    trained_without_waiting(cuda, score_module(cuda, net), batch(cuda))


OTHERS_WITH_CLASSES = [pytest.param(net, marks=pytest.mark.slow) for net in ("ncsnpp", "ddpm", "adm", "uvit")]


@pytest.mark.parametrize("net", ["ddpmpp", "edm2", "dit", *OTHERS_WITH_CLASSES])
def test_classes_and_a_step_that_logs(cuda, net):
    module = score_module(cuda, net, num_classes=10, label_dropout=0.1, log_every=1)
    trained_without_waiting(cuda, module, batch(cuda, 10))


@pytest.mark.parametrize("process", PROCESSES)
def test_processes(cuda, process):
    trained_without_waiting(cuda, score_module(cuda, "tiny", process, "noise", "snr"), batch(cuda))


@pytest.mark.parametrize("row", ROWS)
def test_preconditionings(cuda, row):
    trained_without_waiting(cuda, score_module(cuda, "tiny", "ddpm", row, "min-snr"), batch(cuda))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "meanflow"])
def test_losses(cuda, loss):
    trained_without_waiting(cuda, score_module(cuda, "tiny", "vp", "noise", loss), batch(cuda))


@pytest.mark.parametrize("row", ["edm", "flow"])
def test_meanflow(cuda, row):
    """A forward derivative in float32 beside a value in bfloat16, with one dropout mask."""
    trained_without_waiting(cuda, score_module(cuda, "two times", "flow", row, "meanflow"), batch(cuda))


@pytest.mark.parametrize("augment", [ConditionalAugment(), EVERYTHING], ids=["EDM", "everything"])
def test_augmentation(cuda, augment):
    data = batch(cuda)
    trained_without_waiting(cuda, score_module(cuda, augment=augment), data)
    with cuda.autocast():
        images, labels = augment(data["image"], None)
    assert images.dtype == labels.dtype == torch.float32


def test_noisy_classifier(cuda):
    made = ClassifierModule(
        NoisyClassifier(16, 10, base_channels=16, channel_mult=(1, 2)),
        sde.VP(),
        precondition.PredictNoise(),
        losses.UniformTime(),
        partial(torch.optim.Adam, lr=1e-3),
        SHAPE,
    )
    trained_without_waiting(cuda, on(cuda, made), batch(cuda, 10))


def test_guard_and_averages(cuda, monkeypatch):
    """What runs after every step: the watch for NaN, and the averages."""
    module, data = score_module(cuda), batch(cuda)
    monkeypatch.setattr(type(module), "batches_seen", property(lambda self: 1))
    trainer = SimpleNamespace(callbacks=[], lightning_module=module, global_rank=0, default_root_dir=".")
    guard = NaNGuard(every=50)
    weights = dict(module.ema_network().named_parameters())
    averages = [EMA(0.9999), EMA(HalfLife(images=1000, batch_size=B)), EMA(Power(0.05))]
    for ema in averages:
        ema.shadow = {name: w.detach().clone() for name, w in weights.items()}
    with cuda.counting() as waits:
        for _ in range(3):
            with cuda.autocast():
                module.training_step(data, 0)
            guard.on_train_batch_end(trainer, module, None, None, 0)
            for ema in averages:
                ema.update(weights)
    assert waits == []


# --- sampling ---

SAMPLERS = {
    "consistency": partial(samplers.consistency, num_steps=3),
    "heun": partial(samplers.heun, num_steps=4),
    "heun, stochastic": partial(samplers.heun, num_steps=4, S_churn=10.0),
    "euler": partial(samplers.euler, num_steps=4),
    "probability flow": partial(samplers.probability_flow, num_steps=4),
    "runge-kutta": partial(samplers.runge_kutta, num_steps=4),
    "interpolant sde": partial(samplers.interpolant_sde, num_steps=4),
    "ddim": partial(samplers.ddim, num_steps=4),
    "ddim, stochastic": partial(samplers.ddim, num_steps=4, eta=1.0),
    "dpm-solver++ 2M": partial(samplers.dpm_solver_multistep, num_steps=4),
    "dpm-solver++ 2S": partial(samplers.dpm_solver_singlestep, num_steps=6),
    "unipc": partial(samplers.unipc, num_steps=5),
    "pc": partial(samplers.predictor_corrector, num_steps=4),
    "pc, ancestral": partial(samplers.predictor_corrector, num_steps=4, predictor=samplers.ancestral),
    "pc, Euler-Maruyama": partial(
        samplers.predictor_corrector, num_steps=4, corrector=None, discretization=samplers.euler_maruyama
    ),
    "pc, probability flow": partial(
        samplers.predictor_corrector, num_steps=4, corrector=None, predictor=samplers.probability_flow_step
    ),
    "pc, annealed Langevin": partial(
        samplers.predictor_corrector, num_steps=4, predictor=None, corrector=samplers.AnnealedLangevin()
    ),
    "pc, official": partial(
        samplers.predictor_corrector, num_steps=4, discretization=samplers.OfficialSteps(100)
    ),
    "langevin": partial(samplers.annealed_langevin, num_steps=3, steps_per_level=2, step_size=1e-6),
}


def denoiser(cuda, process="vp", row="noise", num_classes=0):
    names = {"num_classes": num_classes} if num_classes else {}
    net = cuda.put(NETWORKS["tiny"](**names)).eval().requires_grad_(False)
    return Denoiser(net, PROCESSES[process], ROWS[row])


def sampled_without_waiting(cuda, wrapped, sample, label=None):
    """Images by `sample(denoiser, x, ...)`, twice: the host may wait in the first call, which fills caches,
    and for keyed draws."""
    generator = PerSample.keyed(0, range(B))
    for _ in range(2):
        x = wrapped.process.prior_sample((B, *SHAPE), generator, device=cuda.device)
        with cuda.counting() as waits:
            x_0 = sample(wrapped, x, label=label, generator=generator)
        assert x_0.device == cuda.device and x_0.shape == x.shape
        assert x_0.dtype == torch.float64
    assert waits == []


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "process", ["vp", *(pytest.param(p, marks=pytest.mark.slow) for p in ("edm", "ddpm"))]
)
def test_samplers(cuda, process, sampler):
    sampled_without_waiting(cuda, denoiser(cuda, process), SAMPLERS[sampler])


@pytest.mark.parametrize("renoise", [False, True])
def test_sampling_by_meanflow(cuda, renoise):
    net = cuda.put(NETWORKS["two times"]()).eval().requires_grad_(False)
    model = MeanFlowDenoiser(net, PROCESSES["flow"], ROWS["flow"])
    sampled_without_waiting(cuda, model, partial(samplers.meanflow, num_steps=3, renoise=renoise))


@pytest.mark.parametrize("process", ["edm", "ddpm", "ve", "subvp", "flow", "cosine"])
def test_sampling_on_the_other_processes(cuda, process):
    sampled_without_waiting(cuda, denoiser(cuda, process), SAMPLERS["heun"])


@pytest.mark.parametrize("row", ROWS)
def test_sampling_by_preconditioning(cuda, row):
    sampled_without_waiting(cuda, denoiser(cuda, "ddpm", row), SAMPLERS["ddim"])


def wrappers(cuda):
    classifier = cuda.put(NoisyClassifier(16, 10, base_channels=16, channel_mult=(1, 2))).eval()
    classifier.requires_grad_(False)
    good, bad = denoiser(cuda, num_classes=10), denoiser(cuda, num_classes=10)
    return {
        "classifier-free": classifier_free_guidance(good, 2.0),
        "classifier-free, in an interval": classifier_free_guidance(good, 2.0, (0.3, 5.0)),
        "auto": Guidance(good, bad, 2.0),
        "classifier": ClassifierGuidance(good, lambda x, t: classifier(x.float(), x.new_zeros(B).float())),
        "another process": ReparameterizedDenoiser(good, sde.EDM()),
        "clipped": ClippedDenoiser(good),
        "counting": CountingDenoiser(good),
    }


WRAPPERS = [
    "classifier-free",
    "classifier-free, in an interval",
    "auto",
    "classifier",
    "another process",
    "clipped",
    "counting",
]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_denoisers(cuda, name):
    label = cuda.put(torch.arange(B))
    sampled_without_waiting(cuda, wrappers(cuda)[name], SAMPLERS["heun"], label)


OPERATORS = {
    "denoising": lambda: restoration.Denoising(),
    "inpainting": lambda: restoration.Inpainting(restoration.box_mask(16, 16, 4, 4, 8, 8)),
    "colorization": lambda: restoration.Colorization(),
    "super-resolution": lambda: restoration.SuperResolution(2),
    "blur": lambda: restoration.Blur(restoration.gaussian_kernel(1.0, 5)),
    "motion blur": lambda: restoration.Blur(restoration.motion_kernel(5, 30.0)),
}
METHODS = {
    "replacement": partial(restoration.replacement, num_steps=3),
    "repaint": partial(restoration.repaint, num_steps=4, jump_length=2, num_resamples=2),
    "dps": partial(restoration.dps, num_steps=3),
    "pigdm": partial(restoration.pigdm, num_steps=3),
    "mmps": partial(restoration.mmps, num_steps=3, iterations=2),
    "mmps, cg": partial(restoration.mmps, num_steps=3, iterations=2, solver=restoration.cg),
    "ddrm": partial(restoration.ddrm, num_steps=3),
    "ddrm, noise": partial(restoration.ddrm, num_steps=3, noise_std=0.3),
    "ddnm": partial(restoration.ddnm, num_steps=3),
    "ddnm, noise": partial(restoration.ddnm, num_steps=3, travel_repeats=2, noise_std=0.3),
    "diffpir": partial(restoration.diffpir, num_steps=3, inner_steps=2, noise_std=0.3),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("method", METHODS)
def test_restoration(cuda, method, operator):
    A = OPERATORS[operator]()
    y = cuda.put(A(torch.rand(B, *SHAPE) * 2 - 1))

    def restore(wrapped, x, *, label, generator):
        return METHODS[method](wrapped, x, A, y, label=label, generator=generator)

    sampled_without_waiting(cuda, denoiser(cuda), restore)


OBSERVATIONS = {
    "noisy pixels": lambda: restoration.NoisyPixels(0.1 + torch.rand(SHAPE), torch.rand(SHAPE) < 0.5),
    "masked": lambda: restoration.Masked(torch.rand(SHAPE) - 0.5),
}


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("method", ["pigdm", "dps"])
def test_restoration_of_observed_pixels(cuda, method, observation):
    seen = OBSERVATIONS[observation]()
    y = cuda.put(torch.rand(B, *SHAPE) * 2 - 1)

    def restore(wrapped, x, *, label, generator):
        return METHODS[method](wrapped, x, seen, y, label=label, generator=generator)

    sampled_without_waiting(cuda, denoiser(cuda), restore)


def test_module_samples(cuda):
    """What grids and distances call, trajectories included: the images leave the device once."""
    module = score_module(cuda, "tiny", "vp", "noise", "snr", num_classes=10)
    with cuda.autocast():
        assert module.sample(range(B)).dtype == torch.uint8
        assert module.sample_trajectory(range(B), num_frames=3).shape == (B, 3, *SHAPE)


@pytest.mark.parametrize("solve", ["rk45", "encode", "log_likelihood"])
def test_adaptive_solvers(cuda, monkeypatch, solve):
    """Their steps are chosen on the host; devices and dtypes must fit all the same."""
    wrapped, x = denoiser(cuda), cuda.put(torch.rand(B, *SHAPE) * 2 - 1)
    run = {
        "rk45": samplers.rk45,
        "encode": samplers.encode,
        "log_likelihood": partial(likelihood.log_likelihood, generator=PerSample.keyed(0, range(B))),
    }[solve]
    if cuda.real:
        run(wrapped, x)
        return
    monkeypatch.setitem(sys.modules[samplers.rk45.__module__].integrate.__kwdefaults__, "max_steps", 2)
    with pytest.raises(
        RuntimeError, match="was not solved in 2 steps"
    ):  # numbers that are not there never end
        run(wrapped, x)


def test_variational_bound(cuda):
    x = cuda.put(torch.rand(B, *SHAPE) * 2 - 1)
    generator = PerSample.keyed(0, range(B))
    bound = likelihood.variational_bound(denoiser(cuda, "ddpm"), x, num_steps=3, generator=generator)
    assert bound.total.device == cuda.device and bound.total.dtype == torch.float64
