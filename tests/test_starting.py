"""`weights=`: a training starts from a run, a checkpoint, or an official file."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image
from torch.testing import assert_close

from lit_gen import models, runs, train
from lit_gen.config.experiment import build
from lit_gen.errors import ConfigError
from lit_gen.models import start_from
from lit_gen.pretrained.funit import load_discriminator, load_generator
from lit_gen.rng import keyed_generator

HERE = Path(__file__).parent
EDM = HERE / "goldens/score/edm_song_ncsnpp.state_dict.safetensors"
EDM2 = HERE / "goldens/score/edm2_cond.state_dict.safetensors"
SONG = HERE / "goldens/score/song_ncsnpp_ve_cont.ckpt.pth"
FUNIT = HERE / "goldens/funit/tiny"
OLD = HERE / "fixtures/run_2026_11"
LAST = OLD / "checkpoints/last.ckpt"

SMALL = ["model.net.base_channels=8", "model.net.num_blocks=1", "model.net.dropout=0.0"]
EDM_NET = [*SMALL, "model/net=ncsnpp", "model.net.channel_mult=[1,2]", "model.net.attention_resolutions=[8]"]
PHOTOS = ["experiment=digits_edm", "data=folder", "data.image_size=16", "metrics=none", "trainer=cpu"]
PHOTOS += ["data.batch_size=4", "log_every=1"]
OFF = ("~callbacks.quality", "~callbacks.grid", "metrics.objective=val/loss", "callbacks.checkpoint.every=2")
OLD_NET = ["model.net.base_channels=8", "model.net.channel_mult=[1,1]", "logger=csv", "trainer=cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def modeled(compose, *overrides):
    """(module with its random start, its configuration)"""
    from lit_gen.instantiate import config_dict, instantiate

    config = config_dict(compose(*overrides).model)
    return instantiate(config), config


def run(*arguments) -> int:
    before, sys.argv = sys.argv, ["lit_gen.train", *map(str, arguments)]
    try:
        train.main()
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before


@pytest.mark.parity
def test_a_fine_tuning_begins_at_the_official_loss(compose, photos):
    """The official loss of EDM's network at its recorded draws."""
    module, config = modeled(compose, *PHOTOS, *EDM_NET, f"data.train.path={photos}")
    start = start_from(module, EDM, config)
    assert (start.new, start.left_out) == ({}, {}) and start.loaded == len(module.denoiser.net.state_dict())
    io = {k: torch.from_numpy(v) for k, v in np.load(EDM.with_name("edm_song_ncsnpp.io.npz")).items()}
    sigma = (io["loss_EDMPrecond_draw000_randn"].flatten() * 1.2 - 1.2).exp()
    z = io["loss_EDMPrecond_draw001_randn_like"]
    losses = module.eval().loss(module.denoiser, io["images"], sigma, z, label=None)
    assert_close(losses.float(), io["loss_EDMPrecond_per_element_mean"], rtol=2e-5, atol=0)


@pytest.mark.parity
def test_the_first_logged_loss_is_that_of_the_official_network(compose, photos, tmp_path):
    """The same batch and draws, by the network that `sample weights=` opens; the average starts from it."""
    from lit_gen.commands import train as training

    options = [*PHOTOS, *EDM_NET, f"data.train.path={photos}", "trainer.max_steps=1", "logger=csv"]
    options += [f"weights={EDM}", f"logger.csv.save_dir={tmp_path}", "~callbacks.grid"]
    cfg = compose(*options, "callbacks.ema.decay=0")
    training.train(cfg, tmp_path, [])
    module, _, _ = models.open_model(compose(f"weights={EDM}", "model=edm", config_name="sample"))
    data = build(cfg, tmp_path / "other").data
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)["image"]
    draws = module.loss.draw(module.denoiser.process, batch, keyed_generator(0, "noise", 0))
    expected = module.loss(module.denoiser, batch, *draws, label=None).mean()
    assert runs.history(tmp_path)["train/loss"][1] == pytest.approx(expected.item(), rel=1e-6)
    assert json.loads((tmp_path / "summary.json").read_text())["weights"]["new"] == {}


@pytest.mark.parity
def test_edm2_with_another_number_of_classes(compose):
    small = ["model.net.base_channels=8", "model.net.channel_mult=[1,2]", "model.net.num_blocks=1"]
    small += ["experiment=digits", "data.channels=3", "model/net=edm2", "+model.net.head_channels=8"]
    small += ["model.net.attention_resolutions=[4]", "+model.net.concat_balance=0.4", "~model.net.dropout"]
    module, config = modeled(compose, *small, "model.num_classes=3", "model.precondition.sigma_data=0.6")
    assert start_from(module, EDM2, config).new == {}
    io = {k: torch.from_numpy(v) for k, v in np.load(EDM2.with_name("edm2_cond.io.npz")).items()}
    with torch.no_grad():
        out = module.eval().denoiser(io["x"], io["sigma"], io["class_labels"])
    assert (out - io["D_Precond"]).abs().max() <= 2e-5 * io["D_Precond"].abs().max()
    module, config = modeled(compose, *small, "model.num_classes=10")
    before = module.denoiser.net.label.weight.clone()
    start = start_from(module, EDM2, config)
    assert start.new == {"net.label.weight": "classes or other conditions: 16x3 there, 16x10 here"}
    assert torch.equal(module.denoiser.net.label.weight, before)


@pytest.mark.parity
def test_score_sde_by_its_average(compose, photos):
    options = [*PHOTOS, *EDM_NET, f"data.train.path={photos}", "model=ve", "model.process.sigma_max=100"]
    module, config = modeled(compose, *options)
    start = start_from(module, SONG, config)
    assert start.averaged and not start.new and not start.notes
    official, _, _ = models.open_model(compose(f"weights={SONG}", "model=ve", config_name="sample"))
    assert_state(module.denoiser.net, official.denoiser.net.state_dict())
    module, config = modeled(compose, *options, "model.process.sigma_max=60")
    assert "sigma_max=100" in start_from(module, SONG, config, ema=False).notes[0]


def assert_state(net, state):
    assert net.state_dict().keys() == state.keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parity
def test_funit_with_another_number_of_classes(compose, tmp_path):
    generator = [
        "width=8",
        "code_size=8",
        "content_downs=2",
        "class_downs=3",
        "num_res_blocks=1",
        "mlp_width=16",
    ]
    options = ["experiment=funit_glyphs", "data.channels=3", "model.discriminator.width=8"]
    options += ["model.discriminator.num_res_blocks=4", *(f"model.generator.{o}" for o in generator)]
    module, config = modeled(compose, *options, "data.num_classes=7", "model.discriminator.max_width=1024")
    start = start_from(module, FUNIT / "gen_00000000.pt", config)
    assert set(start.new) == {"discriminator.head.weight", "discriminator.head.bias"}
    official = load_generator(FUNIT / "gen_00000000.pt").state_dict()
    assert_state(module.generator, official)
    assert_state(module.generator_ema, official)
    stem = load_discriminator(FUNIT / "dis_00000000.pt").stem.weight
    assert torch.equal(module.discriminator.stem.weight, stem)
    module, config = modeled(compose, *options, "model.discriminator.width=16")
    with pytest.raises(ConfigError, match=r"another network than model\.discriminator"):
        start_from(module, FUNIT / "gen_00000000.pt", config)
    alone = Path(shutil.copy(FUNIT / "gen_00000000.pt", tmp_path))
    start = start_from(modeled(compose, *options, "data.num_classes=7")[0], alone, config)
    assert set(start.new) == {f"discriminator.{k}" for k, _ in module.discriminator.named_parameters()}


def test_our_own_runs_by_their_average(compose):
    overrides = ["model.net.base_channels=8", "model.net.channel_mult=[1,1]", "model.num_classes=4"]
    module, config = modeled(compose, *overrides)
    start = start_from(module, LAST, config)
    assert start.averaged and set(start.new) == {"net.noise.label.weight"} and not start.notes
    old, _, _ = models.load(LAST, device="cpu")
    new = {"noise.label.weight": module.denoiser.net.noise.label.weight}
    assert_state(module.denoiser.net, old.denoiser.net.state_dict() | new)
    module, config = modeled(
        compose, *overrides[:2], "experiment=digits_vp", "model.net.attention_resolutions=[]"
    )
    start = start_from(module, LAST, config, ema=False)
    assert set(start.left_out) == {"net.noise.label.weight", "net.noise.label.bias"} and not start.averaged
    assert [note.split()[1] for note in start.notes] == ["process", "precondition"]


@pytest.mark.parametrize(
    ("weights", "overrides", "says"),
    [
        (LAST, ["model.net.base_channels=16"], r"Set model\.net\.base_channels=8"),
        (LAST, ["model.net.activation=relu"], "activation=silu there and relu here"),
        (LAST, ["model/net=ddpm", "model.net.base_channels=32"], "holds a NCSNpp, but model.net is a DDPM"),
        (EDM, [], r"Set model\.net\.attention_resolutions=\[8\] .*fir=\[1.0,3.0,3.0,1.0\]"),
        (FUNIT / "gen_00000000.pt", [], "neither an EDM snapshot"),
        ("nowhere.pkl", [], "nowhere.pkl does not exist"),
    ],
)
def test_other_networks_are_refused(compose, weights, overrides, says):
    small = ["model.net.base_channels=8", "model.net.channel_mult=[1,1]"]
    module, config = modeled(compose, *small, *overrides)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ConfigError, match=says):
        start_from(module, weights, config)
    assert_state(module, before)


def test_a_refused_start_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("logger=csv", "trainer=cpu", f"weights={FUNIT / 'gen_00000000.pt'}") == 2
    assert "neither an EDM snapshot" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tmp_path, monkeypatch, capsys):
    """Also when the first command is typed again and the weights are gone."""
    monkeypatch.chdir(tmp_path)
    weights = Path(shutil.copy(LAST, tmp_path / "start.ckpt"))
    first = [*OLD_NET, "metrics=none", "~callbacks.grid", "resume=auto", f"weights={weights}"]
    first += ["hydra.run.dir=runs/mine", "callbacks.checkpoint.every=1"]
    assert run(*first, "trainer.max_steps=1") == 0
    assert f"averaged weights of {weights}" in capsys.readouterr().out
    weights.unlink()
    assert run(*first, "trainer.max_steps=2") == 0
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert summary["steps"] == 2 and summary["weights"]["loaded"] > 0
    assert run("resume=runs/mine", f"weights={EDM}") == 2
    assert "goes on from its own checkpoint" in capsys.readouterr().err
    assert run("resume=runs/mine", "model.freeze=encoder.*", "trainer.max_steps=3") == 2
    assert "model.freeze is None there and encoder.* here" in capsys.readouterr().err


def test_frozen_parameters_stay_as_they_are(fit, tmp_path):
    """In the run and in its average; all others move."""
    trained = fit(tmp_path, "model.freeze=encoder.*", "trainer.max_steps=2", *OFF)
    before = fit(tmp_path / "other", "trainer.max_steps=1", "model.optimizer.lr=0", *OFF).module
    loaded, _, _ = models.load(tmp_path / "checkpoints/last.ckpt", device="cpu")
    for module in (trained.module, loaded):
        for name, parameter in module.denoiser.net.named_parameters():
            same = torch.equal(parameter, before.denoiser.net.get_parameter(name))
            assert same == name.startswith("encoder."), name


@pytest.mark.parametrize(("pattern", "says"), [("decode.*", "matches none"), ("*", "matches all")])
def test_freezing_nothing_or_everything_is_refused(compose, pattern, says):
    with pytest.raises(InstantiationException, match=f"{says} of the network.*noise.hidden.weight"):
        modeled(compose, f"model.freeze={pattern}")
