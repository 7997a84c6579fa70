"""The official code's numbers (NVlabs/FUNIT, recorded in the folders that the goldens' README describes).

A case is a folder with a config.json, inputs.npz and gen_00000000.pt; forward_f32/f64.npz, dis_00000000.pt
and the states after training are compared where they are there, entry by entry.
"""

import copy
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gen.funit import losses
from lit_gen.funit.step import Batch, Objective, Outputs, alternating_step, average_
from lit_gen.pretrained import funit as official

pytestmark = pytest.mark.parity

ROOT = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[1] / "goldens") / "funit"
CASES = sorted(p.parent for p in ROOT.glob("*/config.json"))
FORWARD = [(case, bits) for case in CASES for bits in (32, 64) if (case / f"forward_f{bits}.npz").is_file()]
JUDGED = [(case, bits) for case, bits in FORWARD if (case / "dis_00000000.pt").is_file()]
TRAINED = [(case, p.stem[-8:]) for case in CASES for p in sorted(case.glob("f64_gen_0*.pt"))]
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


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double().view_as(a)).abs().max().item()


def close(actual, expected, tolerance: float, what: str, rounding: float = 0.0) -> None:
    """Errors are relative to the largest entry where that exceeds 1 (logits reach hundreds)."""
    error, scale = distance(actual, expected), max(1.0, expected.abs().max().item())
    assert error <= tolerance * scale + rounding, f"{what}: off by {error:.3g}, largest entry {scale:.3g}"


def compare_forward(case: Path, bits: int, actual: dict[str, torch.Tensor], *needed: str) -> None:
    """To 1e-10 in float64; in float32 to 1e-5 beyond what the official float32 run itself is off the float64
    one.
    """
    expected = arrays(case / f"forward_f{bits}.npz", DTYPE[bits])
    exact = case / "forward_f64.npz"
    exact = arrays(exact, DTYPE[64]) if bits == 32 and exact.is_file() else {}
    shared = sorted(actual.keys() & expected.keys())
    assert set(needed) <= set(shared)
    for key in shared:
        reference = "xt" if key == "interp" else key  # recorded in float32 alone
        rounding = distance(expected[reference], exact[reference]) if reference in exact else 0.0
        close(actual[key], expected[key], TOLERANCE[bits], key, rounding)


def test_there_are_goldens():
    assert CASES, f"{ROOT} has no folder with a config.json"


@cache
def generator_outputs(case: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = official.load_generator(case / "gen_00000000.pt", average=False).to(dtype)
    inputs = arrays(case / "inputs.npz", dtype)
    batch = batch_of(inputs, 0)
    with torch.no_grad():
        content = generator.content_code(batch.content)
        code_a, code_b = generator.class_code(batch.content), generator.class_code(batch.classes)
        out = {"content_code": content, "class_code_a": code_a, "class_code_b": code_b}
        out |= {"adain_params_b": generator.mlp(code_b), "xt": generator.decode(content, code_b)}
        out |= {
            "xr": generator.decode(content, code_a),
            "xt_k1": generator(batch.content, batch.classes[:, None]),
        }
        alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
        out["interp"] = torch.stack(
            [generator.decode(content, (1 - a) * code_a + a * code_b) for a in alphas]
        )
        if "xk" in inputs:
            shots = inputs["xk"].unflatten(0, (len(content), -1))
            k = shots.shape[1]
            out[f"class_code_k{k}"] = generator.class_code(shots)
            out[f"xt_k{k}"] = out[f"xt_simple_k{k}"] = generator(batch.content, shots)
            out[f"fewshotgen_forward_k{k}"] = out[f"xt_k{k}"][:1]
    return out


def discriminator_outputs(case: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    discriminator = official.load_discriminator(case / "dis_00000000.pt").to(dtype)
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
        _, parts = losses.hinge_discriminator(logits["real_b"], logits["fake_t"])
        out |= {"loss_dis_real": parts["real"], "loss_dis_fake": parts["fake"]}
        loss, parts = Objective().generator(discriminator, batch, Outputs(made["xt"], made["xr"]))
        out |= {
            "loss_gen_total": loss,
            "loss_adv": parts["adversarial"],
            "loss_x_rec": parts["reconstruction"],
        }
        out |= {"loss_c_rec": parts["content_features"], "loss_m_rec": parts["class_features"]}
    objective = Objective(penalty=losses.official_gradient_penalty)
    loss, parts = objective.discriminator(discriminator, batch, made["xt"])
    out |= {"loss_dis_total": loss.detach(), "grad_penalty": parts["penalty"]}
    _, parts = Objective().discriminator(discriminator, batch, made["xt"])
    return out | {"r1_true_mean": parts["penalty"]}


@pytest.mark.parametrize(("case", "bits"), FORWARD, ids=name)
def test_generator(case, bits):
    compare_forward(case, bits, generator_outputs(case, DTYPE[bits]), "xt")


@pytest.mark.parametrize(("case", "bits"), JUDGED, ids=name)
def test_discriminator_and_losses(case, bits):
    compare_forward(case, bits, discriminator_outputs(case, DTYPE[bits]), "dis_real_b", "loss_gen_total")


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
    """Training in float64 as the case's config.json says, from its initial checkpoints."""

    def __init__(self, case: Path):
        config = json.loads((case / "config.json").read_text())
        self.generator = official.load_generator(case / "gen_00000000.pt", average=False).double()
        self.average = copy.deepcopy(self.generator)
        self.discriminator = official.load_discriminator(case / "dis_00000000.pt").double()
        self.objective = Objective(
            config["gan_w"], config["r_w"], config["fm_w"], losses.official_gradient_penalty
        )
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        rates = {"generator": config["lr_dis"], "discriminator": config["lr_gen"]}  # swapped there
        self.optimizers = {
            n: torch.optim.RMSprop(network.parameters(), lr=rates[n], weight_decay=config["weight_decay"])
            for n, network in networks.items()
        }
        self.gradients: dict[str, dict[str, torch.Tensor]] = {}
        self.inputs = arrays(case / "inputs.npz", torch.float64)

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


def compare_weights(path: Path, entry: str, actual: dict[str, torch.Tensor], tolerance: float) -> None:
    if not path.is_file():
        return
    expected = torch.load(path, weights_only=True)[entry]
    assert set(expected) <= set(actual)
    for key, value in expected.items():
        close(actual[key], value, tolerance, f"{path.name}: {key}")


@pytest.mark.parametrize(("case", "iteration"), TRAINED, ids=name)
def test_training(case, iteration):
    """Weights, moving average, logged losses and the gradients of the first iteration, all in float64."""
    training = Official(case)
    log = json.loads((case / "train_log_f64.json").read_text())
    for i in range(int(iteration)):
        parts = training.step(i)
        for ours, theirs in LOG.items():
            close(
                parts[ours],
                torch.tensor(log[i][theirs], dtype=torch.float64),
                1e-9,
                f"iteration {i + 1}: {theirs}",
            )
        if i == 0:
            gradients = case / "f64_grads_iter1.pt"
            keys = {
                "gen": ("generator", official.generator_keys(training.generator)),
                "dis": ("discriminator", official.discriminator_keys(training.discriminator)),
            }
            for entry, (which, names) in keys.items():
                actual = {theirs: training.gradients[which][ours] for ours, theirs in names.items()}
                compare_weights(gradients, entry, actual, 1e-10)
    actual = official.generator_weights(training.generator)
    compare_weights(case / f"f64_gen_{iteration}.pt", "gen", actual, 1e-9)
    actual = official.generator_weights(training.average)
    compare_weights(case / f"f64_gen_test_{iteration}.pt", "gen_test", actual, 1e-9)
    actual = official.discriminator_weights(training.discriminator)
    compare_weights(case / f"f64_dis_{iteration}.pt", "dis", actual, 1e-9)
