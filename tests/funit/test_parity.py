"""The official code's numbers (NVlabs/FUNIT, recorded in the folders that the goldens' README describes).

A case is a folder with a config.json, inputs.npz and gen_00000000.pt; forward_f32/f64.npz, dis_00000000.pt
and the states after training are compared where they are there, entry by entry. Sizes, batch, K, loss weights
and rates are those of the case.
"""

import copy
import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from official import invert

from lit_gen.funit import losses
from lit_gen.funit.step import Batch, Objective, Outputs, alternating_step, average_
from lit_gen.pretrained.funit import load_discriminator, load_generator, rules

pytestmark = pytest.mark.parity

ROOT = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "funit"
CASES = sorted(p.parent for p in ROOT.glob("*/config.json"))
FORWARD = [(case, bits) for case in CASES for bits in (32, 64) if (case / f"forward_f{bits}.npz").is_file()]
JUDGED = [(case, bits) for case, bits in FORWARD if (case / "dis_00000000.pt").is_file()]
TRAINED = [(case, p.stem[-8:]) for case in CASES for p in sorted(case.glob("f64_gen_0*.pt"))]
LOGGED = [(case, bits) for case in CASES for bits in (32, 64) if (case / f"train_log_f{bits}.json").is_file()]
DTYPE = {32: torch.float32, 64: torch.float64}
TOLERANCE = {32: 1e-5, 64: 1e-10}


def name(value) -> str:
    return value.name if isinstance(value, Path) else str(value)


def arrays(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        tensors = {k: torch.from_numpy(file[k]) for k in file}
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def batch_of(inputs: dict[str, torch.Tensor], i: int) -> Batch:
    return Batch(inputs[f"xa{i}"], inputs[f"la{i}"], inputs[f"xb{i}"], inputs[f"lb{i}"])


def settings(case: Path) -> dict:
    return json.loads((case / "config.json").read_text())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double().reshape(a.shape)).abs().max().item()


def close(actual, expected, tolerance: float, what: str, rounding: float = 0.0) -> None:
    """Errors are relative to the largest entry where that exceeds 1 (logits reach hundreds)."""
    error, scale = distance(actual, expected), max(1.0, expected.abs().max().item())
    assert error <= tolerance * scale + rounding, f"{what}: off by {error:.3g}, largest entry {scale:.3g}"


def compare_forward(case: Path, bits: int, outputs, *needed: str) -> None:
    """`outputs(case, dtype)` to 1e-10 in float64; in float32 to 1e-5 beyond what either float32 run is off
    its own float64 one."""
    expected = arrays(case / f"forward_f{bits}.npz", DTYPE[bits])
    actual = outputs(case, DTYPE[bits])
    exact = case / "forward_f64.npz"
    exact = arrays(exact, DTYPE[64]) if bits == 32 and exact.is_file() else {}
    ours = outputs(case, DTYPE[64]) if bits == 32 else {}
    shared = sorted(actual.keys() & expected.keys())
    assert set(needed) <= set(shared)
    for key in shared:
        rounding = distance(expected[key], exact[key]) if key in exact else 0.0
        rounding += distance(actual[key], ours[key]) if ours else 0.0
        close(actual[key], expected[key], TOLERANCE[bits], key, rounding)


def test_there_are_goldens():
    assert CASES, f"{ROOT} has no folder with a config.json"


@cache
def generator_outputs(case: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = load_generator(case / "gen_00000000.pt", average=False).to(dtype)
    inputs = arrays(case / "inputs.npz", dtype)
    batch = batch_of(inputs, 0)
    with torch.no_grad():
        content = generator.content_code(batch.content)
        code_a, code_b = generator.class_code(batch.content), generator.class_code(batch.classes)
        out = {"content_code": content, "class_code_a": code_a, "class_code_b": code_b}
        out |= {"adain_params_b": generator.mlp(code_b), "xt": generator.decode(content, code_b)}
        out["xr"] = generator.decode(content, code_a)
        alphas = recorded(case).get("interp_alpha", np.array([])).tolist()
        if alphas:
            out["interp"] = torch.stack(
                [generator.decode(content, (1 - a) * code_a + a * code_b) for a in alphas]
            )
        for k in (ks := shots_of(case)):
            out |= k_shot(generator, batch.content, inputs["xk"], k)
        if 1 not in ks:  # else two recordings share the name
            out["xt_k1"] = generator(batch.content, batch.classes[:, None])
    return out


def recorded(case: Path) -> dict[str, np.ndarray]:
    files = [case / f"forward_f{bits}.npz" for bits in (32, 64)]
    return {key: array for file in files if file.is_file() for key, array in np.load(file).items()}


def shots_of(case: Path) -> list[int]:
    """Every K that a class code was recorded for."""
    return [int(m[1]) for key in recorded(case) if (m := re.fullmatch(r"class_code_k(\d+)", key))]


def k_shot(generator, content: torch.Tensor, images: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """K images in a row make one code; as many codes as contents make translations."""
    shots = images[: len(images) // k * k].unflatten(0, (-1, k))
    out = {f"class_code_k{k}": generator.class_code(shots)}
    out[f"fewshotgen_forward_k{k}"] = generator(content[:1], shots[:1])
    if len(shots) == len(content):
        out[f"xt_simple_k{k}"] = generator(content, shots)
        out |= {} if k == 1 else {f"xt_k{k}": out[f"xt_simple_k{k}"]}
    return out


@cache
def discriminator_outputs(case: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    discriminator = load_discriminator(case / "dis_00000000.pt").to(dtype)
    batch = batch_of(arrays(case / "inputs.npz", dtype), 0)
    made = generator_outputs(case, dtype)
    images = {
        "real_b": (batch.classes, batch.class_label),
        "fake_t": (made["xt"], batch.class_label),
        "real_a": (batch.content, batch.content_label),
        "fake_r": (made["xr"], batch.content_label),
    }
    out, logits, features = {}, {}, {}
    with torch.no_grad():
        for key, (x, label) in images.items():
            logits[key], features[key] = discriminator(x, label)
            out |= {f"dis_{key}": logits[key], f"feat_{key}": features[key]}
        out["dis_all_logits_real_b"] = discriminator.head(features["real_b"])
        for side, key in (("t", "fake_t"), ("r", "fake_r")):
            _, parts = losses.hinge_generator(logits[key], logits[key])
            out |= {f"loss_gen_{side}": parts["adversarial"], f"acc_gen_{side}": parts["fooled"]}
        for key, side in (("real_b", "real"), ("fake_t", "fake")):
            judged = (logits[key] >= 0) if side == "real" else (logits[key] < 0)
            out[f"acc_dis_{side}"] = judged.to(dtype).mean()
        _, parts = losses.hinge_discriminator(logits["real_b"], logits["fake_t"])
        out |= {"loss_dis_real": parts["real"], "loss_dis_fake": parts["fake"]}
        objective = objective_of(case)
        loss, parts = objective.generator(discriminator, batch, Outputs(made["xt"], made["xr"]))
        out |= {
            "loss_gen_total": loss,
            "loss_adv": parts["adversarial"],
            "loss_x_rec": parts["reconstruction"],
        }
        out |= {"loss_c_rec": parts["content_features"], "loss_m_rec": parts["class_features"]}
    loss, parts = objective.discriminator(discriminator, batch, made["xt"])
    out |= {"loss_dis_total": loss.detach(), "grad_penalty": parts["penalty"]}
    _, parts = Objective().discriminator(discriminator, batch, made["xt"])
    return out | {"r1_true_mean": parts["penalty"]}


def objective_of(case: Path) -> Objective:
    config = settings(case)
    return Objective(config["gan_w"], config["r_w"], config["fm_w"], losses.official_gradient_penalty)


@pytest.mark.parametrize(("case", "bits"), FORWARD, ids=name)
def test_generator(case, bits):
    compare_forward(case, bits, generator_outputs, "xt")


@pytest.mark.parametrize(("case", "bits"), JUDGED, ids=name)
def test_discriminator_and_losses(case, bits):
    compare_forward(case, bits, discriminator_outputs, "dis_real_b", "loss_gen_total", "loss_dis_total")


LOG = {  # ours -> the names in train_log_f64.json
    "discriminator/loss": "loss_dis_total",
    "discriminator/real": "loss_dis_real_adv",
    "discriminator/fake": "loss_dis_fake_adv",
    "discriminator/penalty": "loss_dis_reg",
    "discriminator/accuracy": "dis_acc",
    "generator/loss": "loss_gen_total",
    "generator/adversarial": "loss_gen_adv",
    "generator/reconstruction": "loss_gen_recon_x",
    "generator/content_features": "loss_gen_recon_c",
    "generator/class_features": "loss_gen_recon_s",
    "generator/fooled": "gen_acc",
}


class Official:
    """Training as the case's config.json says, from its initial checkpoints."""

    def __init__(self, case: Path, dtype: torch.dtype = torch.float64):
        config = settings(case)
        generator = load_generator(case / "gen_00000000.pt", average=False)
        self.generator, self.average = generator.to(dtype), copy.deepcopy(generator).to(dtype)
        self.discriminator = load_discriminator(case / "dis_00000000.pt").to(dtype)
        self.objective = objective_of(case)
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.rates = {"generator": config["lr_dis"], "discriminator": config["lr_gen"]}  # swapped there
        self.optimizers = {
            n: torch.optim.RMSprop(p.parameters(), lr=self.rates[n], weight_decay=config["weight_decay"])
            for n, p in networks.items()
        }
        self.decay = config["weight_decay"]
        self.gradients: dict[str, dict[str, torch.Tensor]] = {}
        self.inputs = arrays(case / "inputs.npz", dtype)

    def update(self, which: str, parts: losses.Parts) -> None:
        self.gradients[which] = {n: p.grad.clone() for n, p in getattr(self, which).named_parameters()}
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def step(self, i: int) -> losses.Parts:
        batch = batch_of(self.inputs, i)
        networks = self.generator, self.discriminator
        parts = alternating_step(*networks, batch, self.objective, lambda loss: loss.backward(), self.update)
        average_(self.average, self.generator, 0.999)
        return parts

    def official_gradients(self) -> dict[str, dict[str, torch.Tensor]]:
        """Of the last step, by the official names."""
        networks = {"gen": ("generator", self.generator), "dis": ("discriminator", self.discriminator)}
        return {
            entry: {theirs: self.gradients[which][ours] for ours, (theirs,), _ in rules(network)}
            for entry, (which, network) in networks.items()
        }

    def rounding(self, steps: int) -> dict[str, float]:
        """What float64's rounding may do to weights without a gradient, by the official names.

        The bias of a convolution in front of a normalisation has the gradient 0 but for rounding. RMSprop
        divides that by its eps of 1e-8, and the weight decay of what came of it as well, at every step.
        """
        found = {}
        for entry, gradients in self.official_gradients().items():
            rate = self.rates["generator" if entry == "gen" else "discriminator"] / 1e-8
            largest = max(g.abs().max().item() for g in gradients.values())
            for key, gradient in gradients.items():
                noise = gradient.abs().max().item()
                if noise < 1e-12 * max(1.0, largest):
                    found[key] = 2 * noise * rate * (1 + rate * self.decay) ** (steps - 1)
        return found


def compare_log(parts: losses.Parts, log: dict[str, float], tolerance: float) -> None:
    for ours, theirs in LOG.items():
        expected = torch.tensor(log[theirs], dtype=torch.float64)
        close(parts[ours], expected, tolerance, f"iteration {log['it']}: {theirs}")


def compare_weights(
    path: Path, entry: str, actual: dict[str, torch.Tensor], tolerance: float, rounding: dict[str, float]
) -> None:
    if not path.is_file():
        return
    expected = torch.load(path, weights_only=True)[entry]
    expected = {key: value for key, value in expected.items() if ".norm.running_" not in key}
    assert set(expected) <= set(actual)
    for key, value in expected.items():
        close(actual[key], value, tolerance, f"{path.name}: {key}", rounding.get(key, 0.0))


@pytest.mark.parametrize(("case", "bits"), LOGGED, ids=name)
def test_first_iteration(case, bits):
    """The logged losses: D's before it moved, G's against the D that has. (From the second on float32 is
    chaotic: RMSprop makes full steps out of rounding errors where a gradient is zero.)"""
    log = json.loads((case / f"train_log_f{bits}.json").read_text())
    compare_log(Official(case, DTYPE[bits]).step(0), log[0], TOLERANCE[bits])


@pytest.mark.parametrize(("case", "iteration"), TRAINED, ids=name)
def test_training(case, iteration):
    """Weights, moving average, logged losses and the gradients of the first iteration, all in float64."""
    training = Official(case)
    log = json.loads((case / "train_log_f64.json").read_text())
    steps = int(iteration)
    for i in range(steps):
        compare_log(training.step(i), log[i], 1e-9)
        if i == 0:
            rounding = training.rounding(steps)
            for entry, gradients in training.official_gradients().items():
                compare_weights(case / "f64_grads_iter1.pt", entry, gradients, 1e-10, {})
    states = {
        "gen": training.generator,
        "gen_test": training.average,
        "dis": training.discriminator,
    }
    for entry, network in states.items():
        weights = invert(network, rules(network))
        compare_weights(case / f"f64_{entry}_{iteration}.pt", entry, weights, 1e-9, rounding)
