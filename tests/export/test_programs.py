"""`format=torch_export` and `format=onnx`: the numbers of the denoiser, for any number of images."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.export.programs import write_onnx, write_torch_export
from lit_gen.export.source import Source
from lit_gen.instantiate import instantiate
from lit_gen.score.denoiser import ReparameterizedDenoiser
from lit_gen.score.sde import EDM

SMALL = ["model.net.channel_mult=[1,1]", "model.net.num_blocks=1", "model.net.attention_resolutions=[4]"]
SMALL = [*SMALL, "model.net.base_channels=16"]
MODELS = {
    "edm": ["experiment=digits", *SMALL, "model/net=ncsnpp", "model.num_classes=10"],
    "ddpm": ["experiment=digits_ddpm", *SMALL],
    "vp": ["experiment=digits_vp", "model/net=adm", *SMALL],
    "ve": ["experiment=digits_ve", *SMALL],
    "upscale": ["experiment=digits_upscale", *SMALL],
}


@pytest.fixture(scope="module")
def source(compose):
    def make(name: str) -> Source:
        torch.manual_seed(0)
        module = instantiate(compose(*MODELS[name]).model).eval().requires_grad_(False)
        for p in module.parameters():
            p.data = p.data + 0.05 * torch.randn_like(p)
        return Source(module, {}, Path(f"{name}.ckpt"), None, True, 5)

    return make


def inputs(module, n: int):
    """Images of n noise levels that the model knows, and what it is told besides."""
    generator = torch.Generator().manual_seed(n)
    process = module.denoiser.process
    levels = process.noise_level(torch.linspace(process.t_max, process.t_min, n, dtype=torch.float64)).float()
    x = torch.randn((n, *module.image_shape), generator=generator) * (1 + levels)[:, None, None, None]
    told = {}
    if module.num_classes:
        told["label"] = torch.arange(n) % module.num_classes
    if module.condition_channels:
        told["image"] = torch.rand((n, module.condition_channels, *x.shape[2:]), generator=generator) * 2 - 1
    return x, levels, told


def expected(module, x, sigma, told):
    from lit_gen.score.condition import Condition

    condition = Condition(**told) if "image" in told else told.get("label")
    return ReparameterizedDenoiser(module.denoiser, EDM())(x, sigma, condition)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("ddpm", "vp", "ve")]


@pytest.mark.parametrize("name", ["edm", "upscale", *OTHERS])
def test_torch_export(name, source, tmp_path):
    made = source(name)
    usage = write_torch_export(made, tmp_path)
    program = torch.export.load(tmp_path / "denoiser.pt2").module()
    for n in (1, 3, 5):
        x, sigma, told = inputs(made.module, n)
        x_0 = program(x=x, sigma=sigma, **told)
        torch.testing.assert_close(x_0, expected(made.module, x, sigma, told), rtol=0, atol=1e-5)
    told = json.loads((tmp_path / "config.json").read_text())
    assert set(told["inputs"]) == {"x", "sigma", *inputs(made.module, 1)[2]}
    assert "denoiser.pt2" in usage.lines and "by at most" in usage.notes


@pytest.mark.parametrize("name", ["edm", OTHERS[0]])
def test_onnx(name, source, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    made = source(name)
    write_onnx(made, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "denoiser.onnx")
    for n in (1, 3, 5):
        x, sigma, told = inputs(made.module, n)
        given = {name: t.numpy() for name, t in {"x": x, "sigma": sigma, **told}.items()}
        (x_0,) = session.run(None, given)
        difference = torch.from_numpy(x_0) - expected(made.module, x, sigma, told)
        # What a network predicts at high noise is multiplied by sigma.
        assert (difference.abs().amax((1, 2, 3)) / sigma.clamp(min=1)).max() < 1e-5


def test_what_cannot_be_a_program(source, tmp_path, monkeypatch):
    made = source("edm")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"lit-gen\[onnx\]"):
        write_onnx(made, tmp_path)
    with pytest.raises(ConfigError, match="denoisers, not of a Linear"):
        write_torch_export(Source(torch.nn.Linear(1, 1), {}, Path("x"), None, True, 0), tmp_path)

    def forward(x, noise_label, *told):
        return x if bool(x.sum() > 0) else -x  # depends on the data

    monkeypatch.setattr(made.module.denoiser.net, "forward", forward)
    with pytest.raises(ConfigError, match="cannot trace"):
        write_torch_export(made, tmp_path)
