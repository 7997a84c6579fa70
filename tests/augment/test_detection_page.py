"""The blocks of Python of docs/detection.md run, and its policy file is one."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from lit_gen.augment import Policy
from lit_gen.data.scenes import Scenes

PAGE = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
KEYS = {"images": "image", "boxes": "boxes", "labels": "labels"}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


class Samples(torch.utils.data.Dataset):
    """(image, target) as torchvision's wrapped sets give them."""

    scenes = Scenes("train", 12)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        item = self.scenes[i]
        boxes = tv_tensors.BoundingBoxes(item["boxes"], format="XYXY", canvas_size=(64, 64))
        return tv_tensors.Image(item["image"]), {"boxes": boxes, "labels": item["labels"]}


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_its_blocks_run(block):
    dataset = Samples()
    items = [dataset.scenes[i] for i in range(4)]
    pairs = []
    for item in items:
        low, high = item["boxes"].split(2, 1)
        center, size = (low + high) / 128, (high - low) / 64
        rows = torch.cat([item["labels"][:, None].float(), center, size], 1)
        pairs.append((item["image"].permute(1, 2, 0).numpy(), rows.numpy()))
    names = {"torch": torch, "json": json, "v2": v2, "DataLoader": DataLoader, "Policy": Policy}
    names |= {name: [item[key] for item in items] for name, key in KEYS.items()}
    names |= dict(zip(("image", "target"), dataset[0], strict=True)) | {"dataset": dataset, "pairs": pairs}
    if "LabelRows" in block:
        names["image"], names["labels"] = pairs[0]
    exec(block, names)
    if "collate_fn" in block:
        assert len(names["images"]) == len(names["targets"]) == 4
        assert all(len(t["boxes"]) == len(t["labels"]) for t in names["targets"])
    elif "LabelRows" in block:
        assert names["labels"].shape[1] == 5 and names["image"].shape == (64, 64, 3)
    elif "policy.sample" in block:
        assert len(names["labels"]) == int(names["keep"].sum()) > 0
    else:
        target = names["target"]
        assert names["image"].dtype == torch.float32 and len(target["boxes"]) == len(target["labels"])


def test_its_policy_file_loads(tmp_path):
    (text,) = (text for kind, text in BLOCKS if kind == "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    policy = Policy.load(tmp_path / "mine.yaml")
    assert policy.partners == 4 and yaml.safe_load(policy.to_yaml())["sub_policies"]
