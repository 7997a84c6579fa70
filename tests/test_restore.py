"""Restoration by the command line: masks, measures, images that do not depend on the batch."""

import json

import pytest
import torch

from lit_gen import restoring
from lit_gen.errors import ConfigError
from lit_gen.images import save_png
from lit_gen.restoring import mask_of, quality


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
