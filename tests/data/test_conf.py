"""conf/data: every data set composes, is made, and holds what its configuration says."""

from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from lit_gen.config import schema
from lit_gen.data.glyphs import Glyphs
from lit_gen.data.strokes import StrokeAugment
from lit_gen.instantiate import instantiate

CONF = Path(__file__).parents[2] / "conf"
REAL = Path("/work/shared/data")


def composed(name: str, *overrides: str):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["~experiment", f"data={name}", *overrides]).data


@pytest.mark.parametrize("name", ["glyphs", "scenes"])
def test_embedded_sets_are_what_their_files_say(name):
    module = instantiate(composed(name))
    module.check()
    batch = next(iter(module.train_dataloader()))
    assert len(batch["index"]) == module.batch_size


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10_zip", "cifar10-test.zip"),
        ("animals64", "animals-64.zip"),
        ("grocery64", "grocery-64.zip"),
        ("omniglot", "omniglot-small1.zip"),
        ("bccd", "bccd-voc.zip"),
    ],
)
def test_sets_from_files_are_what_their_files_say(name, file, monkeypatch):
    if not (REAL / file).exists():
        pytest.skip(f"{file} is not here")
    monkeypatch.setenv("LITGEN_DATA", str(REAL))
    fast = {
        "cifar10_zip": ("+data.train.scan=false", "+data.test.scan=false"),
        "bccd": ("data.train.scan=false",),
    }
    module = instantiate(composed(name, *fast.get(name, ("+data.images.scan=false",))))
    module.check()


def test_a_folder_and_a_zip_need_paths(tmp_path):
    from PIL import Image

    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    module = instantiate(
        composed("folder", f"data.train.path={tmp_path}", "data.image_size=16", "data.batch_size=4")
    )
    module.check()
    assert (len(module.train), len(module.test)) == (18, 2)
    assert module.train[0]["image"].shape == (3, 16, 16)
    with pytest.raises(InstantiationException, match="no such folder or zip file"):
        instantiate(composed("zip", "data.train.path=/nowhere/a.zip", "data.test.path=/nowhere/b.zip"))


def test_every_file_resolves_once_its_path_is_given():
    for file in sorted((CONF / "data").glob("*.yaml")):
        config = composed(file.stem)
        if file.stem == "images":  # its values are those of files: tests/config/test_fitting.py
            continue
        if OmegaConf.is_missing(config, "path"):
            config.path = "given"  # others may be made of it
        nodes = [config, *(config.get(part) for part in ("train", "images", "test"))]
        for node, key in product(nodes, ("path", "name")):
            if OmegaConf.is_config(node) and OmegaConf.is_missing(node, key):
                node[key] = "given"
        if OmegaConf.is_missing(config, "num_classes"):
            config.num_classes = 10
        assert "???" not in str(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)), file
        assert config._target_.startswith("lit_gen.data."), file
        assert config.num_workers == "auto", file


def test_the_options_of_earlier_versions_are_understood():
    old = {
        "_target_": "lit_gen.data.fewshot_module.FewShotDataModule",
        "images": None,
        "own_class_image": True,
    }
    old["restyle"] = {"_target_": "lit_gen.data.restyle.RestyleStrokes", "weight": 0.5}
    options = instantiate(old).pair_options
    assert options["same_class_target"] is True
    assert isinstance(options["content_augment"], StrokeAugment) and options["content_augment"].weight == 0.5


def test_the_glyphs_fill_the_split_of_their_file():
    config = composed("glyphs")
    assert config.target + config.num_classes == len(Glyphs().classes)
