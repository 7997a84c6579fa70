"""Files of U-ViT, DiT, and SiT: bare state dicts, those of a training, what they cannot tell."""

import pytest
import torch
from official import transformer_state
from torch.testing import assert_close

from lit_gen import models, pretrained
from lit_gen.errors import ConfigError
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.models import start_from
from lit_gen.score.networks.dit import DiT
from lit_gen.score.networks.uvit import UViT

NETWORKS = {
    "U-ViT": lambda: UViT(8, 3, 4, 384, 2, 6),
    "U-ViT, classes": lambda: UViT(8, 4, 4, 384, 2, 6, mlp_ratio=2.5, num_classes=10, time_mlp=True),
    "U-ViT, none of the options": lambda: UViT(8, 4, 4, 384, 2, 6, skip=False, conv=False, qkv_bias=True),
    "U-ViT, latents": lambda: UViT(8, 4, 4, 384, 2, 6, num_classes=1000, null_class=True),
    "DiT": lambda: DiT(8, 4, 2, 384, 1, 6, num_classes=10, out_channels=8),
    "DiT, mean alone": lambda: DiT(16, 3, 4, 384, 1, 6, 1.3, num_classes=3),
}


def official(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net, transformer_state(net)


@pytest.mark.parametrize("name", NETWORKS)
def test_released_files(tmp_path, name):
    net, state = official(name)
    torch.save(state, tmp_path / "c.pt")
    read, info = pretrained.load(tmp_path / "c.pt")
    label = torch.tensor([0, -1]) if net.num_classes else None
    x, c = torch.randn(2, net.channels, *(n * net.patch_size for n in net.grid)), torch.tensor([0.0, 3.0])
    assert torch.equal(read(x, c, label), net(x, c, label)) and not read.training
    assert (info.release, info.weights) == (name.split(",")[0].replace("-", "").lower(), "model")
    assert info.network["image_size"] == x.shape[-1]


def test_files_of_a_training(tmp_path):
    net, state = official("DiT")
    average = {key: 2 * value for key, value in state.items()}
    torch.save({"model": state, "ema": average, "opt": {}, "args": None}, tmp_path / "c.pt")
    for ema, factor in ((True, 2), (False, 1)):
        read, info = pretrained.load(tmp_path / "c.pt", ema=ema)
        assert info.weights == ("ema" if ema else "model")
        assert torch.equal(read.head.weight, factor * net.head.weight)


def test_names_are_the_official_ones():
    names = {
        "U-ViT, classes": "patch_embed.proj.bias time_embed.2.weight label_emb.weight pos_embed norm.bias "
        "in_blocks.0.attn.qkv.weight mid_block.norm1.weight out_blocks.0.skip_linear.bias "
        "out_blocks.0.mlp.fc2.weight decoder_pred.weight final_layer.weight",
        "DiT": "x_embedder.proj.weight t_embedder.mlp.0.weight t_embedder.mlp.2.bias pos_embed "
        "y_embedder.embedding_table.weight blocks.0.attn.qkv.bias blocks.0.attn.proj.weight "
        "blocks.0.mlp.fc1.weight blocks.0.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias "
        "final_layer.linear.weight",
    }
    for name, expected in names.items():
        assert set(expected.split()) <= official(name)[1].keys()


def test_files_that_do_not_tell_enough(tmp_path):
    net = UViT(8, 3, 4, 48, 2, 3)
    torch.save(transformer_state(net), tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"c.pt: no released network is 48 wide.*give heads"):
        pretrained.load(tmp_path / "c.pt")
    assert pretrained.load(tmp_path / "c.pt", heads=3)[0].middle.attention.heads == 3
    torch.save(transformer_state(DiT([8, 4], 3, 2, 384, 1, 6)), tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="8 patches make no square: give image_size"):
        pretrained.load(tmp_path / "c.pt")
    torch.save({"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="not those of U-ViT, DiT, or SiT"):
        pretrained.load(tmp_path / "c.pt")


DIGITS = ["experiment=digits_uvit", "data.channels=3", "model.net.depth=2", "model.net.patch_size=4"]


def test_sampling_and_training_start_from_a_file(tmp_path, compose):
    net, state = official("U-ViT")
    path = tmp_path / "c.pth"
    torch.save(state, path)
    module, _, _ = models.open_model(compose(f"weights={path}", "model=vp", config_name="sample"))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    assert_close(module.denoiser.noise(x, t), net(x, 999 * t), rtol=1e-4, atol=1e-4)
    config = config_dict(compose(*DIGITS, "model.net.width=384", "model.net.heads=6").model)
    module = instantiate(config)
    assert start_from(module, path, config).new == {}
    assert torch.equal(module.denoiser.net.eval()(x, t), net(x, t))
    config["net"]["heads"] = 4
    with pytest.raises(ConfigError, match="heads=6 there and 4 here"):
        start_from(instantiate(config), path, config)
