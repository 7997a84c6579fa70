"""Data sets that the library `datasets` has saved: no hub is asked."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lit_gen.data.huggingface import HubImages, data_module
from lit_gen.errors import ConfigError

datasets = pytest.importorskip("datasets")

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 12, 3), dtype=np.uint8)


def rows(n=20):
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["a", "b"]),
        }
    )

    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    columns = {
        "id": list(range(n)),
        "picture": [png(p) for p in PIXELS[:n]],
        "kind": [i % 2 for i in range(n)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def saved(tmp_path):
    rows().save_to_disk(str(tmp_path / "set"))
    return str(tmp_path / "set")


def test_rows_are_images_and_classes(saved):
    found = HubImages(saved)
    assert found.shape == (3, 8, 12) and found.classes == ["a", "b"] and len(found) == 20
    for i in range(20):
        item = found[i]
        assert torch.equal(item["image"], torch.from_numpy(PIXELS[i]).permute(2, 0, 1))
        assert item["label"] == i % 2 == found.labels[i]
    assert found.fingerprint() == HubImages(saved).fingerprint() != HubImages(saved, channels=1).fingerprint()


def test_a_tenth_is_held_out_where_there_is_no_test_split(saved):
    module = data_module(saved, image_size=[8, 12], channels=3, num_classes=2, batch_size=4)
    module.check()
    ids = [[r["id"] for r in part.rows] for part in (module.train, module.test)]
    assert sorted(ids[0] + ids[1]) == list(range(20)) and len(ids[1]) == 2


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_test_split_is_taken(tmp_path, name):
    datasets.DatasetDict({"train": rows(), name: rows(3)}).save_to_disk(str(tmp_path / "set"))
    module = data_module(str(tmp_path / "set"), image_size=8, channels=1, batch_size=4)
    assert (len(module.train), len(module.test)) == (20, 3)
    assert module.train.shape == (1, 8, 8)


def test_refusals(saved, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"has no split 'dev'; it has train"):
        HubImages(saved, "dev")
    with pytest.raises(ConfigError, match=r"'id' is no column of images; its columns are id, picture, kind"):
        HubImages(saved, image_column="id")
    rows().remove_columns("picture").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no column of images among id, kind"):
        HubImages(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.name=.*empty: the data set could not be loaded"):
        HubImages(str(tmp_path / "empty"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install lit-gen\[huggingface\]"):
        HubImages(saved)
