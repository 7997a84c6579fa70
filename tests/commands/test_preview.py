"""The preview's pictures: where things are in the sheets, and that they show what the data module feeds."""

import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

from lit_gen.commands import preview as previewing
from lit_gen.data.detection_module import DetectionDataModule
from lit_gen.data.scenes import Scenes
from lit_gen.errors import ConfigError
from lit_gen.images import boxed_picture, one_size, save_png
from lit_gen.inputs import read_pictures


def test_a_box_is_drawn_where_it_is():
    image = torch.full((1, 10, 12), 7, dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 1.0, 5.0, 4.0], [6.0, 6.0, 6.0, 9.0]])  # the second has no area
    picture = boxed_picture(image, boxes, [(255, 0, 9), (0, 255, 0)], scale=2)
    assert picture.shape == (3, 20, 24)
    outline = torch.zeros(20, 24, dtype=torch.bool)
    outline[2:8, 4:10] = True
    outline[3:7, 5:9] = False
    colour = torch.tensor([255, 0, 9], dtype=torch.uint8)[:, None]
    assert (picture[:, outline] == colour).all() and (picture[:, ~outline] == 7).all()


def test_cells_of_one_size_hold_the_pictures():
    a, b = torch.full((3, 2, 5), 1, dtype=torch.uint8), torch.full((3, 4, 3), 2, dtype=torch.uint8)
    cells = one_size([a, b])
    assert torch.equal(cells[0, :, :2], a) and torch.equal(cells[1, :, :, :3], b)
    assert cells.shape == (2, 3, 4, 5) and int(cells.sum()) == 3 * (10 + 24)


def test_what_is_fed_is_the_first_batch():
    data = DetectionDataModule(Scenes("train", 6), Scenes("test", 2), batch_size=4)
    sheet = previewing.batch_sheets(data, num=3, scale=1)["training_batch"]
    first = next(iter(data.train_dataloader()))
    assert sheet.shape == (3, 66, 1 + 3 * 65)
    for i in range(3):
        cell = sheet[:, 1:65, 1 + 65 * i : 65 + 65 * i]
        untouched = torch.ones(64, 64, dtype=torch.bool)
        for x0, y0, x1, y1 in first["boxes"][i].int().tolist():
            untouched[max(0, y0 - 4) : y1 + 16, max(0, x0 - 4) : x1 + 12] = False  # a box and its text
        assert torch.equal(cell[:, untouched], first["image"][i][:, untouched])


def test_pictures_of_a_folder_and_of_data(compose, tmp_path):
    for i in range(3):
        noise = torch.randint(0, 256, (3, 20 + i, 24), dtype=torch.uint8)
        save_png(noise, tmp_path / "in" / f"{i}.png")
    images = list(read_pictures(tmp_path / "in", 2, fit="shorter").values())
    assert [tuple(x.shape) for x in images] == [(3, 20, 24), (3, 21, 24)]
    common = ["wandb=disabled", "columns=2", f"images={tmp_path}/in", "scale=1"]
    cfg = compose("augment=detection_v0", "num=2", *common, config_name="preview")
    files = previewing.preview(cfg, tmp_path / "a")
    assert sorted(f.name for f in files.values()) == ["policy_0.png", "policy_1.png"]
    with pytest.raises(ConfigError, match="another out"):
        previewing.preview(cfg, tmp_path / "a")
    cfg = compose("data=digits", "augment=randaugment", "wandb=disabled", "rows=1", config_name="preview")
    assert set(previewing.preview(cfg, tmp_path / "b")) == {"policy_0", "training_batch"}


def test_pictures_are_large_enough_to_be_seen_and_small_enough_to_be_sent(compose, tmp_path):
    """Enlarged to 160 pixels at least with boxes, shrunk to 320 at most; `scale=` is taken at its word."""
    image = torch.randint(0, 256, (3, 700, 500), dtype=torch.uint8)
    save_png(image, tmp_path / "large.png")
    save_png(image[:, :64, :50], tmp_path / "small.png")
    for name, options, side in (
        ("large", [], (320, 229)),
        ("small", ["boxes=[[5,5,40,40]]"], (192, 150)),
        ("small", [], (128, 100)),
        ("small", ["scale=1"], (64, 50)),
    ):
        given = [
            "augment=detection_v0",
            "columns=3",
            f"images={tmp_path}/{name}.png",
            "wandb=disabled",
            *options,
        ]
        out = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        previewing.preview(compose(*given, config_name="preview"), out)
        width, height = PIL.Image.open(out / "policy_0.png").size
        h, w = side
        assert height == 4 + h + 5 * (12 + h + 4) + 4
        assert width == 4 + 3 * (w + 4) or 4 + 3 * (w + 4) < width < 400  # narrower than a title


def test_sheets_go_to_wandb(compose, tmp_path):
    """Read back from an offline run: both kinds of pictures, and their files."""
    cfg = compose(
        "data=scenes",
        "augment=detection_v0",
        "columns=1",
        "batch_images=2",
        "wandb=offline",
        config_name="preview",
    )
    previewing.preview(cfg, tmp_path)
    file = next(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    tool = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(tool, capture_output=True, text=True, timeout=1800).stdout
    assert "preview/policy_0" in text and "preview/training_batch" in text
    media = [p.name for p in tmp_path.glob("wandb/offline-run-*/files/media/images/preview/*.png")]
    assert len([n for n in media if n.startswith("policy_0")]) == 1
    assert len([n for n in media if n.startswith("training_batch")]) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "images="),
        (["images=x.png"], "augment="),
        (["images=nowhere.png", "augment=flip"], "Flip has no policy"),
        (["images=nowhere", "augment=detection_v0"], "nowhere"),
        (["data=scenes", "num=0"], "num=0"),
    ],
)
def test_what_does_not_fit_is_refused(compose, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        previewing.preview(compose(*overrides, config_name="preview"), tmp_path)
