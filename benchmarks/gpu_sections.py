"""The sections of `gpu.py`: what is measured, and how time is taken."""

import contextlib
import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Row = dict[str, Any]
Emit = Callable[[Row | str], None]  # a row of the section's table, or a remark below it

# Dense peaks in TFLOP/s by NVIDIA's data sheets (products accumulated in float32), the longest matching name.
PEAKS = {  #               bf16,  TF32, float32
    "H100": (989.4, 494.7, 66.9),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "V100": (None, None, 15.7),
    "T4": (None, None, 8.1),
}
KINDS = ("bf16", "TF32", "float32")
NETWORKS = {  # of cifar10_ddpmpp_vp and cifar10_ncsnpp_ve
    "DDPM++": {"image_size": 32},
    "NCSN++": {"image_size": 32, "embedding": "fourier", "fir": (1, 3, 3, 1), "input_pyramid": "residual"},
}
TINY = {"image_size": 8, "base_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
TARGETS = {"times the float32 step": 3.0, "of the bf16 peak": 0.3}


@dataclass(frozen=True)
class Setting:
    """`tiny`: sizes at which a CPU tries all of it in seconds; its numbers say nothing."""

    device: torch.device
    tiny: bool = False
    data: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def compile(self, network: nn.Module) -> None:
        network.compile(backend="eager" if self.tiny else "inductor")

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def clean(self) -> None:
        """Forgets what the measurement before left on the device."""
        gc.collect()
        torch.compiler.reset()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def median(self, run: Callable[[], Any], seconds: float = 6.0) -> tuple[float, float]:
        """(first call, median of the later ones) in seconds; at most some `seconds` for the latter."""
        first = time.perf_counter()
        run()
        self._mark(wait=True)
        first = time.perf_counter() - first
        for _ in range(0 if self.tiny else 2):
            run()
        marks, end = [self._mark(wait=True)], time.perf_counter() + seconds
        while len(marks) < 3 or (len(marks) < (3 if self.tiny else 50) and time.perf_counter() < end):
            run()
            marks.append(self._mark())
            if self.cuda and len(marks) > 3:
                marks[-3].synchronize()  # the host is two calls ahead, as in a training
        self._mark(wait=True)
        pairs = itertools.pairwise(marks)
        return first, statistics.median(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs)

    def _mark(self, wait: bool = False) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if wait:
            torch.cuda.synchronize(self.device)
        return event


def peak_of(card: str, kind: str) -> float | None:
    """FLOP/s of a known card in a kind of arithmetic; TF32's where there is none is float32's."""
    names = [name for name in PEAKS if name in card.removesuffix(" GPU")]
    if not names:
        return None
    peaks = dict(zip(KINDS, PEAKS[max(names, key=len)], strict=True))
    peak = peaks[kind] or (peaks["float32"] if kind == "TF32" else None)
    return None if peak is None else peak * 1e12


def short(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


# --- training steps ---


class Step:
    """A training step of a score recipe on a fixed batch: loss, backward pass, clipping, Adam, average."""

    def __init__(self, name: str, setting: Setting, batch: int, channels_last: bool = True):
        from lit_gen.score import losses
        from lit_gen.score.denoiser import Denoiser
        from lit_gen.score.networks.ncsnpp import NCSNpp
        from lit_gen.score.precondition import PredictNoise, PredictScaledScore
        from lit_gen.score.sde import VE, VP

        torch.manual_seed(0)
        self.net = NCSNpp(**NETWORKS[name] | (TINY if setting.tiny else {})).to(setting.device)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        rows = {
            "DDPM++": (VP(), PredictNoise(), losses.mean_of_pixels),
            "NCSN++": (VE(), PredictScaledScore(), losses.half_sum_of_pixels),
        }
        process, row, pixels = rows[name]
        self.denoiser = Denoiser(self.net, process, row)
        self.loss = losses.DenoisingLoss(losses.UniformTime(), losses.snr, pixels)
        self.parameters = list(self.net.parameters())
        self.adam = torch.optim.Adam(self.parameters, 2e-4, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        size = self.net.resolutions[0]
        self.images = torch.rand(batch, 3, size, size, device=setting.device) * 2 - 1

    def gradients(self) -> None:
        draws = self.loss.draw(self.denoiser.process, self.images)
        self.loss(self.denoiser, self.images, *draws).mean().backward()

    def __call__(self, autocast: torch.autocast) -> None:
        with autocast:
            self.gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        torch._foreach_lerp_(self.average, self.parameters, 1e-4)


def step_flops(name: str, setting: Setting) -> float:
    """Multiplications and additions of a step for one image, as torch counts them: products, convolutions,
    attention, forwards and backwards."""
    step = Step(name, setting, 2)
    with FlopCounterMode(display=False) as counter:
        step.gradients()
    return counter.get_total_flops() / 2


VARIANTS = (  # precision, channels_last, compiled, the most important first
    ("float32", True, False),
    ("bf16", True, True),
    ("bf16", True, False),
    ("bf16", False, False),
    ("float32", False, False),
    ("float32 without TF32", True, False),
    ("bf16", False, True),
)


def training_steps(name: str, setting: Setting, deadline: float, emit: Emit) -> None:
    from lit_gen.precision import full_float32

    batch = 4 if setting.tiny else 128
    card = torch.cuda.get_device_name(setting.device) if setting.cuda else "CPU"
    work, medians = batch * step_flops(name, setting), {}
    for variant in VARIANTS:
        setting.clean()
        precision, channels_last, compiled = variant
        what = f"{precision}{', compiled' if compiled else ''}"
        row = {"network": name, "step": what, "layout": "channels_last" if channels_last else "contiguous"}
        if time.monotonic() > deadline:
            emit(f"{name}, {what}, {row['layout']}: left out, the time was over.")
            continue
        try:
            with full_float32() if "without" in precision else contextlib.nullcontext():
                step = Step(name, setting, batch, channels_last)
                if compiled:
                    setting.compile(step.net)
                first, seconds = setting.median(partial(step, setting.autocast(precision)))
        except RuntimeError as error:  # out of memory, a compiler that is not there: the others go on
            emit(row | {"error": short(error)})
            continue
        finally:
            step = None
        kind = {"bf16": "bf16", "float32": "TF32"}.get(precision, "float32")
        peak, medians[variant] = peak_of(card, kind), seconds
        row |= {"ms": 1000 * seconds, "images/s": batch / seconds, "TFLOP/s": work / seconds / 1e12}
        row |= {"share of the peak": peak and work / seconds / peak, "of": kind}
        emit(row | {"peak GiB": setting.peak_gib(), "first step s": first})
    _verdicts(name, work, medians, peak_of(card, "bf16"), emit)


def _verdicts(name: str, work: float, medians: dict[tuple, float], peak: float | None, emit: Emit) -> None:
    """Whether the compiled bf16 step meets the targets."""
    eager, compiled = (medians.get(variant) for variant in VARIANTS[:2])
    values = {
        "times the float32 step": eager and compiled and eager / compiled,
        "of the bf16 peak": peak and compiled and work / compiled / peak,
    }
    for what, target in TARGETS.items():
        value = values[what]
        outcome = "n/a" if value is None else f"{value:.2f}: {'pass' if value >= target else 'miss'}"
        emit(f"{name}, bf16 + compile, {what} (target {target:g}): {outcome}")


# --- the rest ---


def sampling(setting: Setting, deadline: float, emit: Emit) -> None:
    from lit_gen.score.losses import edm_loss
    from lit_gen.score.module import ScoreModule
    from lit_gen.score.networks.ncsnpp import NCSNpp
    from lit_gen.score.precondition import EDMPrecondition
    from lit_gen.score.samplers import heun
    from lit_gen.score.sde import EDM

    number, steps = (4, 3) if setting.tiny else (256, 18)
    variants = (("float32", False), ("bf16", False), ("bf16", True), ("fp16", False))
    for (precision, compiled), name in itertools.product(variants, NETWORKS):
        setting.clean()
        if time.monotonic() > deadline:
            emit(f"{name}, {precision}{', compiled' if compiled else ''}: left out, the time was over.")
            continue
        torch.manual_seed(0)
        net = NCSNpp(**NETWORKS[name] | (TINY if setting.tiny else {}))
        sampler, shape = partial(heun, num_steps=steps), (3, net.resolutions[0], net.resolutions[0])
        module = ScoreModule(net, EDM(), EDMPrecondition(), edm_loss(), torch.optim.Adam, sampler, shape)
        module.to(setting.device)
        module.sampling_precision = precision
        if compiled:
            setting.compile(net)
        first, seconds = setting.median(partial(module.sample, range(number)))
        row = {"network": name, "network's precision": precision, "compiled": compiled, "images": number}
        row |= {"evaluations": 2 * steps - 1, "images/s": number / seconds}
        emit(row | {"peak GiB": setting.peak_gib(), "first call s": first})


def funit(setting: Setting, deadline: float, emit: Emit) -> None:
    from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator
    from lit_gen.funit.step import Batch, Objective

    width, size, batch = (8, 32, 2) if setting.tiny else (64, 128, 8)  # 8 images a GPU are the official run's
    for precision, channels_last in (("float32", False), ("bf16", False), ("bf16", True), ("float32", True)):
        setting.clean()
        if time.monotonic() > deadline:
            emit(f"{precision}, channels_last={channels_last}: left out, the time was over.")
            continue
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        networks = {
            "generator": FewShotGenerator(width=width),
            "discriminator": PatchDiscriminator(119, width=width, max_width=16 * width),
        }
        for network in networks.values():
            network.to(setting.device, memory_format=layout)
        average = copy.deepcopy(networks["generator"]).requires_grad_(False)
        optimizers = {
            which: torch.optim.RMSprop(network.parameters(), lr=1e-4, weight_decay=1e-4)
            for which, network in networks.items()
        }
        images = torch.rand(2, batch, 3, size, size, device=setting.device) * 2 - 1
        labels = torch.randint(119, (2, batch), device=setting.device)
        data = Batch(images[0], labels[0], images[1], labels[1])

        step = partial(_iteration, setting, precision, networks, average, optimizers, data, Objective())
        first, seconds = setting.median(step)
        row = {"image": size, "batch": batch, "precision": precision, "layout": str(layout)[6:]}
        row |= {"ms": 1000 * seconds, "images/s": batch / seconds}
        emit(row | {"peak GiB": setting.peak_gib(), "first iteration s": first})


def _iteration(
    setting: Setting, precision: str, networks: Any, average: Any, optimizers: Any, data: Any, objective: Any
) -> None:
    """Both turns and the average, as FUNITModule's training step."""
    from lit_gen.funit.step import alternating_step, average_

    def update(which: str, parts: Any) -> None:
        optimizers[which].step()
        optimizers[which].zero_grad()

    with setting.autocast(precision):
        alternating_step(*networks.values(), data, objective, torch.Tensor.backward, update)
    average_(average, networks["generator"])


def augmentation(setting: Setting, deadline: float, emit: Emit) -> None:
    from lit_gen.augment import Policy

    policy, n = Policy.load("classification_cifar10"), 8 if setting.tiny else 512
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    draws = policy.sample_batch(n, torch.Generator().manual_seed(0))
    for device in dict.fromkeys([setting.device, torch.device("cpu")]):
        there = images.to(device)
        _, seconds = setting.median(partial(policy.apply_batch, there, None, draws), 3)
        emit({"policy": "classification_cifar10", "device": device.type, "images/s": n / seconds})


def fid_pass(setting: Setting, deadline: float, emit: Emit) -> None:
    from lit_gen.metrics import FeatureStatistics

    extractor, n = random_inception(), 2 if setting.tiny else 256
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=setting.device)
    statistics = FeatureStatistics(extractor.id.d).to(setting.device)
    _, seconds = setting.median(lambda: statistics.update(extractor(images)))
    emit({"images": n, "images/s": n / seconds, "50,000 images s": 50000 * seconds / n})
    emit("Inception has random weights: its time does not depend on them. Full float32, as every FID here.")


def random_inception() -> Any:
    """The network of the FID pass, by torchvision, which has the same layers, with random weights."""
    from torchvision.models import inception_v3

    from lit_gen.metrics.extractors import Extractor, ExtractorId
    from lit_gen.metrics.inception import _Inception, resize_tf1

    graph = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    identity = ExtractorId("inception-random", "1", "0" * 64, "tf1", "2048", 2048)
    return Extractor(identity, _Inception(graph, resize_tf1), channels=3)
