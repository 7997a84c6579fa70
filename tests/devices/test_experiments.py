"""Two steps of every experiment, in the precision that a GPU gets, and where there is one, four on it, where
the host must not wait after the second.

Each recipe has its optimizer, clipping, average, augmentation and data transforms; its networks are made
narrow and shallow, and synthetic images stand in for its data.
"""

import pytest
import torch
from omegaconf import DictConfig, open_dict

from lit_gen import checkpoints
from lit_gen.autoencoder import AutoencoderKL
from lit_gen.autoencoder.codec import write_codec
from lit_gen.cli import CONF_DIR
from lit_gen.commands import train as training
from lit_gen.data.images import TensorImages
from lit_gen.data.shards import write_shards
from lit_gen.images import Pixels, height_and_width, save_png
from lit_gen.module import BaseModule
from lit_gen.rng import keyed_generator

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
OPTIONS = [
    "trainer=cpu",
    "trainer.precision=bf16-mixed",
    "trainer.max_steps=2",
    "log_every=1",
    "data.batch_size=2",
    "data.num_workers=0",
]
LARGE = (  # of images or depth; smaller ones have the same kinds of layers, steps, and data
    "celeba64_ncsnpp_ve",
    "celeba64_ncsnv2",
    "church256_ncsnpp_ve",
    "cifar10_ddpmpp_subvp",
    "cifar10_ncsnpp_deep_ve",
    "ffhq64_edm_ve",
    "ffhq64_edm_vp",
    "funit_animal_faces",
)
EVALUATIONS = ("quality", "grid", "translations", "validation")
NARROW = {
    "net": {"base_channels": 16, "width": 16, "num_blocks": 1},
    "generator": {"width": 4, "code_size": 8, "mlp_width": 16},
    "discriminator": {"width": 4, "max_width": 16},
}


def photos(folder) -> list[str]:
    """The option of experiment=images, which is told everything by the files: gray photos of 16x20."""
    for i in range(20):
        image = torch.randint(0, 256, (1, 16, 20), generator=keyed_generator(i)).to(torch.uint8)
        save_png(image, folder / "photos" / f"{i}.png")
    return [f"data.path={folder / 'photos'}"]


def latents(folder, data: DictConfig) -> None:
    """A prepared set of eight latents of the recipe's format, without pictures."""
    network = AutoencoderKL(3, data.channels, (4,), 1, 4)
    shape = (8, 2 * data.channels, data.image_size, data.image_size)
    pixels = Pixels("float32", (-1, 1), bounded=False)
    labels = torch.arange(8) % (data.num_classes or 1)
    classes = [str(i) for i in range(data.num_classes or 0)]
    moments = TensorImages(torch.rand(shape, generator=keyed_generator(0)), labels, classes, pixels=pixels)
    for split in ("train", "test"):
        write_shards(moments, f"{folder}/{split}", workers=0, shard_mib=1, bar=lambda rows, total: rows)
    scale = {name: [1.0] * data.channels for name in ("mean", "std")}
    write_codec(folder, network, (3, *shape[2:]), scale, factor=1.0, shift=0.0)
    data.path, data.images = str(folder), None


def shrunk(config: DictConfig, folder) -> DictConfig:
    with open_dict(config):
        if "latents" in config.data._target_:
            latents(folder, config.data)
        config.logger = {}
        config.callbacks = {k: v for k, v in config.callbacks.items() if k not in EVALUATIONS}
        narrow(config.model)
        synthesize(config.data)
        for option in {"tune", "distill"} & config.model.get("loss", {}).keys():
            config.model.loss[option] = False  # there is no model to start from
    return config


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.startswith("detector")])
def test_four_steps_on_a_gpu(compose, tmp_path, monkeypatch, name):
    """torchvision's detectors wait by design and are left out."""
    start, end = BaseModule.on_train_batch_start, BaseModule.on_train_batch_end

    def armed(self, batch, batch_idx):
        start(self, batch, batch_idx)
        if batch_idx >= 2:
            torch.cuda.set_sync_debug_mode("error")

    def disarmed(self, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")
        end(self, outputs, batch, batch_idx)

    monkeypatch.setattr(BaseModule, "on_train_batch_start", armed)
    monkeypatch.setattr(BaseModule, "on_train_batch_end", disarmed)
    options = ["trainer=gpu", "trainer.max_steps=4", "data.batch_size=2", "data.num_workers=0"]
    options += photos(tmp_path) if name == "images" else []
    try:
        training.train(shrunk(compose(f"experiment={name}", *options), tmp_path / "data"), tmp_path, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state = checkpoints.read(checkpoints.folder(tmp_path) / "last.ckpt")
    assert state["batches_seen"] == 4
    assert all(w.isfinite().all() for w in state["state_dict"].values())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in EXPERIMENTS],
)
def test_two_steps(compose, tmp_path, name):
    given = photos(tmp_path) if name == "images" else []
    training.train(shrunk(compose(f"experiment={name}", *OPTIONS, *given), tmp_path / "data"), tmp_path, [])
    state = checkpoints.read(checkpoints.folder(tmp_path) / "last.ckpt")
    assert state["batches_seen"] == state["global_step"] == 2
    assert state["config"]["trainer"]["precision"] == "bf16-mixed"
    for optimizer in state["optimizer_states"]:
        for values in optimizer["state"].values():
            assert values["step"] == 2 and all(
                torch.isfinite(torch.as_tensor(v)).all() for v in values.values()
            )
    moved = [v for o in state["optimizer_states"] for s in o["state"].values() for v in s.values() if v.ndim]
    assert any(v.any() for v in moved)
    assert all(w.isfinite().all() for w in state["state_dict"].values())


def narrow(model: DictConfig) -> None:
    for part, widths in NARROW.items():
        for option in widths.keys() & (model.get(part) or {}).keys():
            model[part][option] = widths[option]
    if model.get("net") and model.net._target_.endswith(("DiT", "UViT")):
        model.net.depth = 2


def synthesize(data: DictConfig) -> None:
    """The data module of the recipe, with its transforms, on images that are made here."""
    size, channels = data.image_size, data.get("channels", 3)
    if "path" in data or "letters" in data._target_:
        return  # `photos`, `latents`, or what is rendered here
    if "sound" in data:  # bytes instead of what espeak-ng speaks
        data._target_, data.dtype, data.range = "lit_gen.data.ImageDataModule", "uint8", None
        size = data.image_size = [data.sound.bands, data.sound.frames]
        for option in ("words", "takes", "rate", "sound"):
            data.pop(option)
    if "images" in data:
        images = {"_target_": "lit_gen.data.glyphs.Glyphs", "channels": channels}
        data.images = images | {"image_size": data.images.get("image_size", size)}
        data.train_list = data.test_list = None
        data.target, data.num_classes = 24, 100
    elif data._target_.endswith("DetectionDataModule"):
        scenes = {"_target_": "lit_gen.data.scenes.Scenes", "size": 8, "image_size": size}
        data.train, data.test = ({**scenes, "split": split} for split in ("train", "test"))
        data.num_classes = 10
    else:
        images = {
            "_target_": "torchvision.datasets.FakeData",
            "size": 8,
            "image_size": [channels, *height_and_width(size)],
        }
        data.train = data.test = {**images, "num_classes": data.get("num_classes") or 10}
