"""Restoration by the command line: masks, measures, images that do not depend on the batch."""

import json
from itertools import cycle

import numpy as np
import pytest
import torch
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet

from lit_gen.commands import restore as restoring
from lit_gen.data.decode import decode
from lit_gen.data.digits import digits
from lit_gen.errors import ConfigError
from lit_gen.images import save_png
from lit_gen.inputs import mask_of
from lit_gen.metrics import restored
from lit_gen.metrics.restored import Perceptual, quality
from lit_gen.score.restoration import SuperResolution


@pytest.mark.parametrize("spec", ["left", "right", "top", "bottom"])
def test_half_masks(spec):
    assert mask_of(spec, 8).sum() == 32


def test_masks(tmp_path):
    assert mask_of("center", 8).sum() == 64 - 16 and not mask_of("center", 8)[0, 2:6, 2:6].any()
    assert torch.equal(mask_of("random", 16), mask_of("random", 16))
    drawn = torch.zeros(1, 8, 8, dtype=torch.uint8)
    drawn[:, :3] = 255
    assert torch.equal(mask_of(str(save_png(drawn, tmp_path / "mask.png")), 8), drawn > 127)
    with pytest.raises(ConfigError, match="mask=middle"):
        mask_of("middle", 8)


def test_quality_of_known_errors():
    a = torch.randint(0, 200, (3, 1, 8, 8), dtype=torch.uint8)
    assert quality(a + 10, a)["psnr"] == pytest.approx(20 * torch.log10(torch.tensor(25.5)).item(), abs=1e-4)
    assert quality(a, a)["ssim"] == pytest.approx(1)


def test_files_are_written_once_and_do_not_depend_on_the_batch_size(compose, goldens, tmp_path):
    weights = goldens / "score" / "song_ncsnpp_ve_cont.ckpt.pth"
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        picture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
        save_png(picture, tmp_path / "pictures" / f"{i}.png")
    common = [f"weights={weights}", "model=ve", f"images={tmp_path}/pictures", "device=cpu", "samples=2"]
    common += ["method=replacement", "method.num_steps=3"]
    for name, size in (("a", 4), ("b", 3)):
        out = tmp_path / name
        restoring.restore(compose(*common, f"batch_size={size}", f"out={out}", config_name="restore"), out)
        assert (out / "sheet.png").is_file()
    with pytest.raises(ConfigError, match="another out"):
        restoring.restore(compose(*common, f"out={out}", config_name="restore"), out)
    record = json.loads((tmp_path / "a" / "restoration.json").read_text())
    again = json.loads((tmp_path / "b" / "restoration.json").read_text())
    assert record["restored"]["psnr"] == pytest.approx(again["restored"]["psnr"], abs=1e-2)
    assert len(list((tmp_path / "a" / "images").glob("*.png"))) == 2 * 4


@pytest.fixture
def tiny_run(fit, tmp_path):
    """A checkpoint of the class-conditional digits, two steps old."""
    fit(tmp_path / "run", "trainer.max_steps=2", "~callbacks.quality", "~callbacks.grid")
    return next((tmp_path / "run").rglob("*.ckpt"))


METHODS = {
    "replacement": ["method.num_steps=3"],
    "repaint": ["method.num_steps=3", "method.num_resamples=2"],
    "dps": ["method.num_steps=3"],
    "pigdm": ["method.num_steps=3"],
    "mmps": ["method.num_steps=3"],
    "ddrm": ["method.num_steps=3"],
    "ddnm": ["method.num_steps=3", "method.travel_repeats=2"],
    "diffpir": ["method.num_steps=3"],
}
OPERATORS = ("inpaint", "super_resolution", "blur", "motion_blur", "denoise")


def test_the_command_takes_every_method_and_every_operator(tiny_run, compose, tmp_path, capsys):
    """All but DPS meet a measurement without noise exactly, whatever the model. The whole product is
    tests/score/restoration/test_combinations.py's."""
    for (method, steps), operator in zip(METHODS.items(), cycle(OPERATORS), strict=False):
        out = tmp_path / method
        given = [f"run={tiny_run}", "device=cpu", "num=2", "samples=1", f"method={method}", *steps]
        cfg = compose(*given, f"operator={operator}", f"out={out}", config_name="restore")
        record = restoring.restore(cfg, out)
        assert (out / "sheet.png").is_file()
        assert record["labels"] == digits("test").batch(range(2))["label"].tolist()
        if operator == "denoise":
            assert method != "dps" and record["restored"]["ssim"] == pytest.approx(1)
        else:
            assert record["restored"]["psnr"] != record["degraded"]["psnr"]
    assert "LPIPS left out" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["replacement", "repaint"])
def test_noise_that_would_be_blown_up_is_refused(tiny_run, compose, tmp_path, method):
    """Undoing a blur multiplies noise; filling a gap does not."""
    given = [f"run={tiny_run}", "device=cpu", "num=2", "samples=1", f"method={method}", *METHODS[method]]

    def restore(*more):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return restoring.restore(compose(*given, *more, f"out={out}", config_name="restore"), out)

    with pytest.raises(ConfigError, match=r"noise_std=0.1: .* times larger. Take method=dps"):
        restore("noise_std=0.1", "operator=blur")
    restore("noise_std=0.1", "operator=inpaint")
    restore("operator=blur")


def test_a_map_of_noise(tiny_run, compose, tmp_path):
    """Its pixels of 0 are measured exactly, the others are not; what it does not fit is refused in words."""
    std = np.zeros((8, 8))
    std[:, 4:] = 0.5
    np.save(tmp_path / "map.npy", std)

    def restore(*more):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        given = [f"run={tiny_run}", "device=cpu", "num=2", "samples=1", "operator=denoise", *more]
        restoring.restore(compose(*given, f"out={out}", config_name="restore"), out)
        names = ("original", "degraded", "restored_0")
        return [decode((out / "images" / f"0000_{n}.png").read_bytes(), n, channels=1).int() for n in names]

    given = f"noise_std={tmp_path}/map.npy"
    original, degraded, restored = restore(given, "method=ddnm", "method.num_steps=5")
    assert (
        torch.equal(degraded[..., :4], original[..., :4]) and (degraded - original)[..., 4:].abs().max() > 30
    )
    assert (restored - original)[..., :4].abs().max() <= 1 < (restored - original)[..., 4:].abs().max()
    for more, words in (
        ((given, "method=repaint"), "is a map: method=repaint takes"),
        ((given, "operator=blur", "method=ddrm"), "is a map, and Blur mixes pixels"),
        (
            (given, "operator=super_resolution"),
            r"map \(8, 8\), which does not fit a measurement \(1, 1, 2, 2\)",
        ),
        (("noise_std=none.npy",), "noise_std=none.npy: give a number, or an npy file"),
        (("noise_std=-1",), "noise_std=-1"),
    ):
        with pytest.raises(ConfigError, match=words):
            restore(*more)


def test_colour_needs_colours(tiny_run, compose, tmp_path):
    given = [f"run={tiny_run}", "device=cpu", "operator=colorize", f"out={tmp_path}/a"]
    with pytest.raises(ConfigError, match="the images have 1"):
        restoring.restore(compose(*given, config_name="restore"), tmp_path / "a")
    assert not any((tmp_path / "a").iterdir())


def test_a_conditional_model_is_told_a_class(tiny_run, compose, tmp_path):
    """Its own images' classes, or what `label` says; other pictures have none, which it never saw."""
    picture = save_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "a.png")
    given = [f"run={tiny_run}", "device=cpu", "method=pigdm", "method.num_steps=2", "samples=1"]

    def labels(*more):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return restoring.restore(compose(*given, *more, f"out={out}", config_name="restore"), out)["labels"]

    assert labels("num=3", "label=7") == [7, 7, 7]
    assert labels(f"images={picture}", "label=0") == [0]
    with pytest.raises(ConfigError, match="give label=<0 to 9>"):
        labels(f"images={picture}")
    with pytest.raises(ConfigError, match="classes are 0 to 9"):
        labels("label=10")


def test_lpips_of_given_weights_is_that_of_torchmetrics(tmp_path, monkeypatch):
    """With an AlexNet drawn at random, which torchmetrics finds in its own way, in torch's cache."""
    torch.manual_seed(0)
    file = tmp_path / "checkpoints" / restored.ALEXNET
    file.parent.mkdir()
    torch.save(alexnet(weights=None).state_dict(), file)
    a, b = torch.randint(0, 256, (2, 3, 1, 32, 32), dtype=torch.uint8)
    judge = Perceptual(str(file), 32)
    assert judge(a, a) == {"lpips": pytest.approx(0, abs=1e-6)}
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    pair = [(x.expand(-1, 3, -1, -1) / 127.5 - 1) for x in (a, b)]
    assert judge(a, b)["lpips"] == pytest.approx(float(theirs(*pair)), rel=1e-5)
    assert Perceptual(None, 32).name == str(file)
    assert Perceptual(None, 8)(a, b) == {} and "needs images of 31 pixels" in Perceptual(None, 8).name
    with pytest.raises(ConfigError, match="no such file"):
        Perceptual(str(tmp_path / "none.pth"), 32)


def test_measurements_from_a_file(tiny_run, compose, tmp_path, capsys):
    """Those that the command itself makes of the test images give the same restorations, from a file."""
    x = digits("test").batch(range(2))["image"].float() / 127.5 - 1
    y = SuperResolution(2)(x)
    np.savez(tmp_path / "y.npz", y.movedim(1, -1).double().numpy())
    given = [f"run={tiny_run}", "device=cpu", "num=2", "samples=2", "operator=super_resolution"]
    given += ["operator.factor=2", "method=ddnm", "method.num_steps=3", "label=3"]

    def restore(*more, out):
        cfg = compose(*given, *more, f"out={tmp_path / out}", config_name="restore")
        return restoring.restore(cfg, tmp_path / out)

    restore(out="a")
    record = restore(f"observed={tmp_path}/y.npz", out="b")
    assert "restored" not in record and record["labels"] == [3, 3] and record["num"] == 2
    for name in ("0000_restored_0", "0001_restored_1", "0001_degraded"):
        a, b = (
            decode((tmp_path / o / "images" / f"{name}.png").read_bytes(), name, channels=1) for o in "ab"
        )
        assert torch.equal(a, b)
    assert not (tmp_path / "b" / "images" / "0000_original.png").exists()
    assert "2 measurements, 2 restorations of each" in capsys.readouterr().out
    for array, words in (
        (np.zeros((2, 8, 8, 1)), r"arr_0 is \(2, 8, 8, 1\); what this operator gives .* is \(N, 4, 4, 1\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), "arr_0 is uint8; give floats"),
        (np.full((2, 4, 4, 1), np.nan), "values that are no numbers"),
    ):
        np.savez(tmp_path / "bad.npz", array)
        with pytest.raises(ConfigError, match=words):
            restore(f"observed={tmp_path}/bad.npz", out="c")
    with pytest.raises(ConfigError, match=r"observed=none.npz: give an npz file"):
        restore("observed=none.npz", out="c")


def test_what_a_noise_covers_is_not_believed(tiny_run, compose, tmp_path):
    """Where the noise is louder than any image, what was measured says nothing."""
    floor = np.full((1, 8, 8), -np.inf)
    floor[..., 4:] = 3.0
    np.save(tmp_path / "floor.npy", floor)
    restored = []
    for value in (3.0, 3.2):
        y = np.full((1, 8, 8, 1), -0.5)
        y[:, :, 4:] = value
        np.savez(tmp_path / "y.npz", y)
        given = [f"run={tiny_run}", "device=cpu", "samples=1", "label=3", f"observed={tmp_path}/y.npz"]
        given += ["operator=masked", f"operator.floor={tmp_path}/floor.npy", "method.num_steps=20"]
        out = tmp_path / str(value)
        restoring.restore(compose(*given, f"out={out}", config_name="restore"), out)
        restored.append(decode((out / "images" / "0000_restored_0.png").read_bytes(), "r", channels=1).int())
    assert (restored[0] - restored[1]).abs().max() <= 1
    assert (restored[0][..., :4] - 64).abs().max() < 30
