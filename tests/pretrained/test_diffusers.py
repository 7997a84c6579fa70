"""Autoencoders of diffusers and latent-diffusion: both layouts, read off the tensors, and their numbers."""

import json

import pytest
import torch
from official import invert
from safetensors.torch import save_file

from lit_gen.autoencoder import AutoencoderKL
from lit_gen.errors import ConfigError
from lit_gen.pretrained import diffusers

NETWORKS = {
    "two levels": {"channels": 3, "widths": [16, 32], "groups": 8},
    "three levels": {"channels": 1, "widths": [8, 8, 16], "blocks": 1, "groups": 4, "latent_channels": 3},
    "without": {"channels": 3, "widths": [8, 16], "groups": 8, "attention": False, "projections": False},
}
RELEASES = ("diffusers", "latent-diffusion")


def network(name):
    torch.manual_seed(0)
    net = AutoencoderKL(**NETWORKS[name])
    for p in net.parameters():  # norms and biases too
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_goes_where_it_belongs(name, release):
    net = network(name)
    state = invert(net, diffusers.rules(net, release))
    read = diffusers.from_state_dict(state, net.options["groups"])
    assert read.options == net.options
    own = net.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in read.state_dict().items())


def test_names_are_those_of_the_releases():
    net = AutoencoderKL(channels=3, widths=(8, 8, 16), groups=8)
    keys = {r: {keys[0] for _, keys, _ in diffusers.rules(net, r)} for r in RELEASES}
    assert {
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "encoder.down_blocks.2.resnets.0.conv_shortcut.weight",
        "decoder.up_blocks.1.upsamplers.0.conv.bias",
        "decoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.mid_block.resnets.1.norm2.weight",
        "decoder.conv_norm_out.weight",
        "post_quant_conv.weight",
    } <= keys["diffusers"]
    assert {
        "encoder.down.1.downsample.conv.weight",
        "decoder.up.2.block.2.conv1.weight",  # the lowest resolution, which comes first
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight",
        "decoder.norm_out.weight",
        "quant_conv.bias",
    } <= keys["latent-diffusion"]


def test_the_default_is_that_of_stable_diffusion():
    with torch.device("meta"):
        net = AutoencoderKL()
    assert sum(p.numel() for p in net.parameters()) == 83_653_863 and net.factor == 8


PER_CHANNEL = {"scaling_factor": 0.5, "latents_mean": [-1.6, 1.1, -0.2, 0.4], "latents_std": [2, 4, 1, 0.5]}


@pytest.mark.parametrize("scale", [{}, {"scaling_factor": 1.5305, "shift_factor": 0.0609}, PER_CHANNEL])
def test_folders_and_files_are_found(tmp_path, scale):
    net = network("two levels")
    folder = tmp_path / "model" / "vae"
    folder.mkdir(parents=True)
    save_file(invert(net, diffusers.rules(net, "diffusers")), folder / diffusers.FILES[0])
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": 8} | scale
    (folder / "config.json").write_text(json.dumps(config))
    x = torch.randn(1, 3, 8, 8)
    for path in (tmp_path / "model", folder, folder / diffusers.FILES[0]):
        read, found = diffusers.load(path)
        assert torch.equal(read.encode(x)[0], net.encode(x)[0])
        expected = (scale.get("scaling_factor", 0.18215), scale.get("shift_factor", 0.0))
        if "latents_std" in scale:  # (z - mean) scaling_factor / std
            expected = ([0.25, 0.125, 0.5, 1.0], scale["latents_mean"])
        assert (found.factor, found.shift) == expected
    state = invert(net, diffusers.rules(net, "latent-diffusion"))
    whole = {f"first_stage_model.{key}": t for key, t in state.items()} | {"cond.weight": torch.zeros(1)}
    torch.save({"state_dict": whole}, folder / "sd.pth")  # groups from the config.json beside it
    assert torch.equal(diffusers.load(folder / "sd.pth")[0].decode(x[:, :, :4].repeat(1, 2, 1, 1)[:, :4]),
                       net.decode(x[:, :, :4].repeat(1, 2, 1, 1)[:, :4]))  # fmt: skip


def test_attention_by_its_old_names():
    net = network("two levels")
    state = invert(net, diffusers.rules(net, "diffusers"))
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f".{new}.", f".{old}."): t for key, t in state.items()}
    assert any(".proj_attn." in key for key in state)
    read = diffusers.from_state_dict(state, 8)
    assert all(torch.equal(t, net.state_dict()[key]) for key, t in read.state_dict().items())


def test_other_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a run folder of lit_gen nor a model of diffusers"):
        diffusers.load(tmp_path)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"a\.pth: its layers are not those of an AutoencoderKL"):
        diffusers.load(tmp_path / "a.pth")
    net = network("two levels")
    state = invert(net, diffusers.rules(net, "diffusers"))
    del state["decoder.conv_out.bias"]
    with pytest.raises(ConfigError, match=r"lacks decoder.conv_out.bias"):
        diffusers.from_state_dict(state, 8)
    save_file(invert(net, diffusers.rules(net, "diffusers")), tmp_path / "b.safetensors")
    for config, words in (
        ({"_class_name": "AutoencoderTiny"}, r"an autoencoder of AutoencoderTiny"),
        ({"act_fn": "relu"}, r"act_fn=relu: only autoencoders with silu"),
        ({"latents_mean": [0.0], "norm_num_groups": 8}, r"latents_mean=\[0.0\].* give . numbers each"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=words):
            diffusers.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", NETWORKS)
def test_our_numbers_are_those_of_diffusers(name):
    official = pytest.importorskip("diffusers")
    options = NETWORKS[name]
    depth = len(options["widths"])
    theirs = official.AutoencoderKL(
        in_channels=options["channels"],
        out_channels=options["channels"],
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=options["widths"],
        layers_per_block=options.get("blocks", 2),
        latent_channels=options.get("latent_channels", 4),
        norm_num_groups=options["groups"],
        mid_block_add_attention=options.get("attention", True),
        use_quant_conv=options.get("projections", True),
        use_post_quant_conv=options.get("projections", True),
    ).eval()
    torch.manual_seed(1)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    ours = diffusers.from_state_dict(theirs.state_dict(), options["groups"]).double()
    theirs, x = theirs.double(), torch.randn(2, options["channels"], 16, 24, dtype=torch.float64)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        mean, deviation = ours.encode(x)
        for a, b in (
            (mean, posterior.mean),
            (deviation, posterior.std),
            (ours.decode(mean), theirs.decode(mean).sample),
        ):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max()
