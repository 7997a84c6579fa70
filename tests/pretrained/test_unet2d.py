"""diffusers' UNet2DModel: both directions, against diffusers itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lit_gen
from lit_gen import pretrained
from lit_gen.errors import ConfigError
from lit_gen.pretrained import unet2d
from lit_gen.score.networks import ADM, DDPM, NCSNpp

SMALL = {"image_size": 8, "channel_mult": (1, 1), "num_blocks": 1, "attention_resolutions": (4,)}
VE = {"embedding": "fourier", "fir": (1, 3, 3, 1), "input_pyramid": "skip", "output_pyramid": "skip"}
NETWORKS = {
    "ddpm": lambda **more: DDPM(**SMALL | {"base_channels": 64} | more),
    "ho": lambda **more: DDPM(**SMALL | {"base_channels": 64, "decoder_attention": "each"} | more),
    "adm": lambda **more: ADM(**SMALL | {"base_channels": 128, "num_classes": 3} | more),
    "ncsnpp": lambda **more: NCSNpp(**SMALL | {"base_channels": 128} | VE | more),
}


def network(name: str):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for p in net.parameters():  # norms, biases, and what starts at zero too
        p.data = p.data + (
            torch.randn_like(p) / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * torch.randn_like(p)
        )
    return net.eval().requires_grad_(False)


def outputs(net, theirs, dtype):
    """Of both networks, for the same noise levels, times from 0 to 999, or log noise levels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    if isinstance(net, NCSNpp):
        level = torch.tensor([0.01, 1.0, 200.0], dtype=dtype)
        return net(2 * x - 1, level.log()), theirs(x, level).sample * level[:, None, None, None]
    c = torch.tensor([-1.5, 0.3, 1.1] if isinstance(net, ADM) else [0, 17, 999])
    label = torch.tensor([2, 0, 1]) if net.num_classes else None
    return net(x, c.to(dtype), label), theirs(x, c, class_labels=label).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_is_that_of_diffusers(name, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    net = network(name)
    config = unet2d.unet_config(net) | {"sample_size": 8}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    save_file(unet2d.state_dict(net), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    ours, expected = outputs(net, theirs, torch.float32)
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-5)
    assert expected.std() > 0.1
    # Sinusoids of times up to 999 have no more than 4 digits after the point in float32: the rest is equal.
    embedding = diffusers.models.embeddings
    original = embedding.get_timestep_embedding
    monkeypatch.setattr(
        embedding, "get_timestep_embedding", lambda t, *a, **k: waves(net, t, original(t, *a, **k))
    )
    ours, expected = outputs(net.double(), theirs.double(), torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def waves(net, t, theirs):
    """Our sinusoids, which are theirs up to rounding, in float64."""
    ours = net.noise.embedding(t)
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-4)
    return ours


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_is_read(name, tmp_path):
    net = network(name)
    config = unet2d.unet_config(net) | {"sample_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(unet2d.state_dict(net), tmp_path / "diffusion_pytorch_model.safetensors")
    read, info = pretrained.load(tmp_path)
    assert type(read) is type(net) and info.release == "diffusers"
    generator = torch.Generator().manual_seed(1)
    x, c = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.5, 3.0])
    label = torch.tensor([2, 0]) if net.num_classes else None
    assert torch.equal(read(x, c, label), net(x, c, label))
    if name != "ddpm":  # whose blocks without attention come back with one that adds nothing
        own = net.state_dict()
        assert all(torch.equal(t, own[key]) for key, t in read.state_dict().items())


def test_names_of_the_first_versions_are_known(tmp_path):
    net = network("ho")
    state = unet2d.state_dict(net)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, before in old.items():
        state = {key.replace(new, before): t for key, t in state.items()}
    assert any(".query." in key for key in state)
    config = unet2d.unet_config(net) | {"sample_size": 8}
    del config["time_embedding_dim"], config["resnet_time_scale_shift"]  # what they left out
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    read, _ = pretrained.load(tmp_path)
    assert all(torch.equal(t, net.state_dict()[key]) for key, t in read.state_dict().items())


def test_a_folder_samples_and_starts_a_training(tmp_path, compose):
    from lit_gen.instantiate import instantiate
    from lit_gen.models import start_from

    net = network("ho")
    (tmp_path / "unet").mkdir()
    config = unet2d.unet_config(net) | {"sample_size": 8}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    save_file(unet2d.state_dict(net), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    model = lit_gen.load(tmp_path, model="ddpm", device="cpu")
    assert model.sample(2, sampler="ddim", num_steps=2).shape == (2, 3, 8, 8)
    own = net.state_dict()
    assert all(torch.equal(t, own[key]) for key, t in model.module.denoiser.net.state_dict().items())
    options = ["base_channels=64", "channel_mult=[1,1]", "num_blocks=1", "attention_resolutions=[4]"]
    options = [f"model.net.{option}" for option in (*options, "decoder_attention=each")]
    cfg = compose("experiment=digits_ddpm", "data.channels=3", *options)
    module = instantiate(cfg.model)
    start = start_from(module, tmp_path, cfg.model)
    assert not start.new and not start.left_out
    assert torch.equal(module.denoiser.net.stem.weight, net.stem.weight)


def test_noise_levels_of_another_process_are_refused(tmp_path):
    net = network("ncsnpp")
    for folder in ("unet", "scheduler"):
        (tmp_path / folder).mkdir()
    config = unet2d.unet_config(net) | {"sample_size": 8}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    save_file(unet2d.state_dict(net), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    levels = {"sigma_min": 0.01, "sigma_max": 380.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(levels))
    with pytest.raises(ConfigError, match="sigma_max=760"):
        lit_gen.load(tmp_path, model="ve", device="cpu")


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (DDPM(8, base_channels=16, channel_mult=(1, 2)), "groups"),
        (DDPM(8, base_channels=64, channel_mult=(1, 1), num_classes=2), "classes"),
        (DDPM(8, base_channels=64, channel_mult=(1, 1), resample_conv=False), "resamples"),
        (ADM(8, base_channels=128, channel_mult=(1, 1), augment_dim=9), "augment_dim"),
        (ADM(8, base_channels=64, channel_mult=(2, 2), num_blocks=1), "channel_mult must begin"),
        (NCSNpp(8, base_channels=128, channel_mult=(1, 1), num_blocks=1), "embedding=positional"),
        (NCSNpp(8, channels=1, base_channels=128, channel_mult=(1, 1), num_blocks=1, **VE), "3 channels"),
    ],
)
def test_what_diffusers_has_not(net, says):
    with pytest.raises(ConfigError, match=says):
        unet2d.unet_config(net)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"downsample_padding": 1}, "downsample_padding=1"),
        ({"mid_block_scale_factor": 1.5}, "mid_block_scale_factor=1.5"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"block_out_channels": [64, 128]}, "groups|diffusers checkpoint"),
    ],
)
def test_what_we_have_not(changed, says, tmp_path):
    net = network("ho")
    config = unet2d.unet_config(net) | {"sample_size": 8} | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(unet2d.state_dict(net), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=says):
        pretrained.load(tmp_path)
    assert len(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
