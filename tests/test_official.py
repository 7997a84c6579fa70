"""`weights=<official checkpoint> model=...` gives the official codes' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.models import open_model

pytestmark = pytest.mark.parity


@pytest.fixture
def opened(compose, goldens):
    """`opened(file, *overrides) -> (module, recorded numbers)`, skipped where the file is not there."""

    def make(file, *overrides):
        path = Path(goldens) / "score" / file
        if not path.is_file():  # the committed subset has the VE checkpoint alone
            pytest.skip(f"{file} is not among the committed goldens")
        module, _, _ = open_model(compose(f"weights={path}", *overrides, config_name="sample"))
        io = np.load(path.with_name(file.split(".")[0] + ".io.npz"))
        return module, {k: torch.from_numpy(io[k]) for k in io.files}

    return make


def assert_near(mine, theirs, rtol):
    assert (mine - theirs).abs().max() <= rtol * theirs.abs().max()


@pytest.mark.parametrize(("ema", "out"), [("false", "out_after"), ("true", "out_after_ema")])
def test_score_sde_ve(opened, ema, out):
    """The official network lives on [0, 1]: twice the noise, half the score in ours."""
    module, io = opened("song_ncsnpp_ve_cont.ckpt.pth", "model=ve", f"ema={ema}")
    denoiser = module.denoiser
    score = denoiser.score(2 * io["x"] - 1, denoiser.process.time(2 * io["labels"]))
    assert_near(score, io[out] / 2, 2e-5)


VP = [("song_ddpmpp_vp_cont", "false", "out_after"), ("song_ddpmpp_vp_cont", "true", "out_after_ema")]


@pytest.mark.parametrize(("name", "ema", "out"), [*VP, ("song_ddpm_vp_cont", "false", "out")])
def test_score_sde_vp(opened, name, ema, out):
    """score = -net(x, 999 t) / sigma(t)"""
    module, io = opened(f"{name}.ckpt.pth", "model=vp", f"ema={ema}")
    t = io["labels"] / 999
    score = module.denoiser.score(io["x"], t)
    assert_near(score * module.denoiser.process.sigma(t).reshape(-1, 1, 1, 1), -io[out], 1e-5)


@pytest.mark.parametrize(("name", "highest"), [("ncsn", 1), ("ncsnv2", 50)])
def test_ncsn(opened, name, highest):
    level = f"model.process.sigma_max={2 * highest}"
    module, io = opened(f"{name}.ckpt.pth", f"model={name}", level, "image_size=16", "ema=false")
    denoiser = module.denoiser
    score = denoiser.score(2 * io["x"] - 1, denoiser.process.time(2 * io["sigmas"][io["labels"]]))
    assert_near(score, io["out_after"] / 2, 1e-5)


@pytest.mark.parametrize(("model", "row"), [("edm", "EDM"), ("vp", "VP"), ("ve", "VE")])
def test_edm_networks_in_each_row(opened, model, row):
    """D(x; sigma) of EDM's unscaled x is ours of alpha(t) x at the time of that noise level."""
    module, io = opened("edm_song_ddpmpp.state_dict.pt", f"model={model}")
    denoiser = module.denoiser
    t = denoiser.process.time(io["sigma"])
    x_t = denoiser.process.alpha(t).reshape(-1, 1, 1, 1) * io["x"]
    assert_near(denoiser(x_t.float(), t), io[f"D_{row}Precond"], 1e-5)


def test_noise_levels_that_contradict_the_file_are_refused(opened):
    with pytest.raises(
        ConfigError, match=r"set model\.process\.sigma_min=0\.02 model\.process\.sigma_max=100"
    ):
        opened("song_ncsnpp_ve_cont.ckpt.pth", "model=ve", "model.process.sigma_max=60")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "Give run="),
        (["weights=nowhere.pth"], "nowhere.pth"),
        (["weights=a", "run=b"], "Give run="),
    ],
)
def test_what_is_missing_is_named(compose, options, says):
    with pytest.raises(ConfigError, match=says):
        open_model(compose(*options, config_name="sample"))
