"""Images to latents and back: closed forms of a Gaussian, ends of an interpolation, the files."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_gen.commands import encode as encoding
from lit_gen.commands.encode import between, solve
from lit_gen.errors import ConfigError
from lit_gen.rng import keyed_generator
from lit_gen.score.denoiser import GaussianDenoiser, GaussianMixtureDenoiser
from lit_gen.score.sde import EDM, VE, VP, Flow, SubVP

PROCESSES = [EDM(0.01, 40.0), VE(0.01, 40.0), VP(), SubVP(), Flow()]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
MEAN = torch.tensor([0.3, -0.4, 0.1, 0.2]).reshape(1, 2, 2)
VARIANCE = torch.tensor([0.04, 0.25, 0.5, 1.0]).reshape(1, 2, 2)
TIGHT = {"rtol": 1e-7, "atol": 1e-7}


def data(n):
    z = torch.randn(n, 1, 2, 2, generator=keyed_generator("data"), dtype=torch.float64)
    return MEAN + VARIANCE.sqrt() * z


@each_process
def test_latents_of_gaussian_data_are_the_closed_form_and_come_back(process):
    """The flow of a Gaussian scales the distance to the mean with the deviation of the marginal."""
    denoiser, x = GaussianDenoiser(process, MEAN, VARIANCE), data(7)
    start, end = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    std = [(process.alpha(t).square() * VARIANCE + process.sigma(t).square()).sqrt() for t in (start, end)]
    exact = process.alpha(end) * MEAN + (x - process.alpha(start) * MEAN) * std[1] / std[0]
    latents = solve(denoiser, x, inverse=True, batch_size=3, **TIGHT)
    assert_close(latents / process.prior_std, exact / process.prior_std, rtol=0, atol=1e-5)
    assert_close(solve(denoiser, latents, batch_size=4, **TIGHT), x, rtol=0, atol=1e-5)


def test_the_ends_of_an_interpolation_are_the_decoded_ends():
    """And its classes go in straight lines: a class alone at the ends, both in the middle."""
    means = torch.stack([MEAN, -MEAN, 0 * MEAN])
    denoiser = GaussianMixtureDenoiser(EDM(0.01, 20.0), means, torch.tensor(0.09), torch.ones(3))
    x, labels = data(3), torch.eye(3, dtype=torch.float64)
    latents = solve(denoiser, x, labels, inverse=True, **TIGHT)
    way, rows = between(latents, labels, 5)
    assert way.shape == (10, 1, 2, 2) and rows.shape == (10, 3)
    images = solve(denoiser, way, rows, **TIGHT).view(2, 5, 1, 2, 2)
    for pair in range(2):
        assert_close(images[pair, 0], x[pair], rtol=0, atol=1e-5)
        assert_close(images[pair, -1], x[pair + 1], rtol=0, atol=1e-5)
    assert torch.equal(rows[[0, 2, 4]], torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]]).double())
    assert between(latents, None, 5)[1] is None


def test_the_command_writes_its_files_once(fit, compose, tmp_path):
    fit(tmp_path / "run", "trainer.max_steps=2", "~callbacks.quality", "~callbacks.grid")
    checkpoint = next((tmp_path / "run").rglob("*.ckpt"), None)
    assert checkpoint is not None
    out = tmp_path / "latents"
    given = [f"run={checkpoint}", "num=3", "interpolate=4", "rtol=1e-4", "atol=1e-4", "device=cpu"]
    cfg = compose(*given, f"out={out}", config_name="encode")
    record = encoding.encode(cfg, out)
    saved, stored = json.loads((out / "encoding.json").read_text()), np.load(out / "latents.npz")
    assert saved == record and stored["latents"].shape == (3, 1, 8, 8)
    assert record["round_trip"]["rms"] < 0.03 and len(record["labels"]) == 3
    lengths = np.linalg.norm(stored["latents"].reshape(3, -1), axis=1) / (8 * 80)
    assert record["latent_lengths"] == pytest.approx(lengths.tolist()) and (out / "strip.png").is_file()
    with pytest.raises(ConfigError, match="another out"):
        encoding.encode(cfg, out)
    for mistake, says in {
        "interpolate=1": "interpolate=1",
        "rtol=0": "rtol=0",
        "label=10": "classes are 0 to 9",
    }.items():
        with pytest.raises(ConfigError, match=says):
            cfg = compose(*given, mistake, f"out={tmp_path}/b", config_name="encode")
            encoding.encode(cfg, tmp_path / "b")
