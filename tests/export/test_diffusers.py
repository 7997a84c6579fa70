"""`lit-gen export format=diffusers`: diffusers loads the folders, without lit_gen where it has no such
network, and generates what lit_gen generates."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gen.errors import ConfigError
from lit_gen.export.bundle import bundle
from lit_gen.export.diffusers import betas_of, write_diffusers
from lit_gen.export.source import Source
from lit_gen.funit.translator import translate
from lit_gen.images import to_uint8
from lit_gen.instantiate import config_dict, instantiate
from lit_gen.rng import PerSample, key
from lit_gen.score.samplers import ddim

SMALL = ["model.net.channel_mult=[1,1]", "model.net.num_blocks=1", "model.net.attention_resolutions=[4]"]
MODELS = {
    "ddpm": ["experiment=digits_ddpm", *SMALL, "model.net.base_channels=64"],
    "vp": ["experiment=digits_vp", "model/net=ddpm", *SMALL, "model.net.base_channels=64"],
    "ve": [
        "experiment=digits_ve",
        "data.channels=3",
        "model/net=ncsnpp256",
        *SMALL,
        "model.net.base_channels=128",
        "model.process.sigma_max=20",
    ],
    "adm": ["experiment=digits_edm", "model/net=adm", *SMALL, "model.net.base_channels=128"],
    "song": ["experiment=digits", *SMALL, "model.net.base_channels=16", "sampler.num_steps=3"],
    "flow": ["experiment=digits_flow", "model/net=edm2", *SMALL, "model.net.base_channels=32"],
    "funit": ["experiment=funit_glyphs", "data.image_size=32", "model.generator.width=4"],
    "style": [
        "experiment=glyphs_diffusion",
        "data.image_size=16",
        "model.net={width: 32, outer_width: 16, num_blocks: 2, code_size: 8, encoder_width: 8}",
        "sampler.num_steps=3",
    ],
}


@pytest.fixture(scope="module")
def source(compose):
    def make(name: str) -> Source:
        torch.manual_seed(0)
        cfg = compose(*MODELS[name])
        module = instantiate(cfg.model).eval().requires_grad_(False)
        for p in module.parameters():
            p.data = p.data + 0.05 * torch.randn_like(p)
        if name == "funit":
            module.generator_ema.load_state_dict(module.generator.state_dict())
        config = {"model": config_dict(cfg.model)}
        return Source(module, config, Path(f"{name}.ckpt"), None, True, 5)

    return make


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """diffusers, whose copies of code go into a folder of the test."""
    diffusers = pytest.importorskip("diffusers")
    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("modules"))
    from diffusers.utils import dynamic_modules_utils

    patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", folder)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield diffusers
    patch.undo()


def generators(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def loaded(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shown(x):
    """Images in [-1, 1] as a pipeline shows them."""
    return (x / 2 + 0.5).clamp(0, 1).float()


@pytest.mark.parametrize("name", ["ddpm", "vp"])
def test_ddim_is_that_of_diffusers(name, source, hub, tmp_path):
    made = source(name)
    usage = write_diffusers(made, tmp_path)
    assert not list(tmp_path.rglob("*.py")) and "DDIMPipeline" in usage.lines
    pipe = loaded(hub.DDIMPipeline.from_pretrained(tmp_path))
    assert type(pipe.unet) is hub.UNet2DModel
    images = pipe(batch_size=2, num_inference_steps=5, generator=generators(), output_type="pt").images
    denoiser = made.module.denoiser
    told = torch.tensor([999, 799, 599, 399, 199], dtype=torch.float64)
    times = {"ddpm": (told + 1) / 1000, "vp": told / 999}[name]

    def grid(process, num_steps):
        return torch.cat([times, process.time(torch.zeros(1, dtype=torch.float64))])

    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators()])
    expected = ddim(denoiser, x, num_steps=5, grid=grid)
    torch.testing.assert_close(images, shown(expected), rtol=0, atol=1e-5)
    assert images.std() > 0.1


def test_ve_is_that_of_diffusers(source, hub, tmp_path):
    made = source("ve")
    assert "ScoreSdeVePipeline" in write_diffusers(made, tmp_path).lines
    pipe = loaded(hub.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(pipe).__name__ == "ScoreSdeVePipeline"
    assert not list(tmp_path.rglob("*.py")) and (pipe.scheduler.config.sigma_max == 10)
    denoiser = made.module.denoiser

    class Ours(torch.nn.Module):
        """Our score of [0, 1] images in the place of theirs."""

        config, device = pipe.unet.config, torch.device("cpu")

        def forward(self, sample, level):
            t = denoiser.process.time(2 * level)
            return hub.utils.BaseOutput(sample=2 * denoiser.score(2 * sample - 1, t))

    drawn = []
    for unet in (pipe.unet, Ours()):
        pipe.register_modules(unet=unet)
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
        drawn.append(torch.from_numpy(pipe(batch_size=2, **options).images))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
    assert drawn[0].std() > 0.1


@pytest.mark.parametrize(
    ("name", "network"), [("adm", "UNet2DModel"), ("song", "Network"), ("flow", "Network")]
)
def test_our_sampler_runs_in_diffusers(name, network, source, hub, tmp_path):
    made = source(name)
    write_diffusers(made, tmp_path)
    pipe = loaded(hub.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True))
    assert type(pipe.unet).__name__ == network
    module = made.module
    labels = torch.tensor([1, 0]) if module.num_classes else None
    images = pipe(batch_size=2, class_labels=labels, generator=generators(), output_type="pt").images
    draws = PerSample(generators())
    x = module.denoiser.process.prior_sample((2, *module.image_shape), draws)
    expected = shown(module.sampler(module.denoiser, x, label=labels, generator=draws))
    torch.testing.assert_close(images, expected, rtol=0, atol=3e-5 if name == "adm" else 1e-6)
    assert images.std() > 0.1
    (picture,) = pipe(num_inference_steps=2).images
    assert picture.size == (8, 8) and picture.mode == "L"


ALONE = """
import sys, torch
for name in ("lit_gen", "hydra", "omegaconf", "lightning"):
    sys.modules[name] = None
import diffusers
folder, out = sys.argv[1:]
answers = {}
for name in ("song", "funit", "style"):
    pipe = diffusers.DiffusionPipeline.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images, seeds, options = torch.load(f"{folder}/{name}/given.pt")
    if seeds:
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    answers[name] = pipe(*images, output_type="pt", **options).images
torch.save(answers, out)
"""


def test_without_lit_gen(source, tmp_path):
    pytest.importorskip("diffusers")
    expected, seeds = {}, [key(0, "sample", i) for i in range(2)]  # as a module draws
    for name, size in (("song", 8), ("funit", 32), ("style", 16)):
        made, folder = source(name), tmp_path / name
        folder.mkdir()
        write_diffusers(made, folder)
        images = [torch.rand(n, 1, size, size, generator=generators()[0]) * 2 - 1 for n in (2, 3)]
        if name == "song":
            expected[name] = made.module.sample(range(2))
            torch.save(([], seeds, {"batch_size": 2}), folder / "given.pt")
        elif name == "funit":
            expected[name] = translate(made.module.generator_ema, *images)
            torch.save((images, [], {}), folder / "given.pt")
        else:
            expected[name] = made.module.translate(*images)
            torch.save((images, seeds, {}), folder / "given.pt")
    answers = tmp_path / "answers.pt"
    run = [sys.executable, "-c", ALONE, str(tmp_path), str(answers)]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, images in torch.load(answers).items():
        difference = to_uint8(2 * images - 1).int() - expected[name].int()
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 1e-2, name
        assert expected[name].float().std() > 5, name


def code_of(text: str):
    """Without docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


NETWORKS = ["NCSNpp", "ADM", "DDPM", "EDM2", "DiT", "UViT", "NCSN", "NCSNv2", "styled.StyledUNet"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_written(name):
    """And imports nothing but torch and the standard library."""
    text = bundle([f"lit_gen.score.networks.{name}"])
    imported = {
        line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported <= {"torch", *sys.stdlib_module_names}
    names: dict = {"__name__": name}
    exec(compile(text, name, "exec"), names)
    assert isinstance(names[name.split(".")[-1]], type)
    for alias, attribute in re.findall(r"\b(layers)\.(\w+)", "\n".join(code_of(text))):
        assert hasattr(names[alias], attribute), f"{alias}.{attribute}"


def test_ncsnpp_on_another_process_is_its_own_network(compose, tmp_path):
    """diffusers' divides by the noise level, which is not what it is told there."""
    ve = ["experiment=digits_vp", "model/net=ncsnpp256", *MODELS["ve"][1:2], *MODELS["ve"][3:-1]]
    cfg = compose(*ve)
    config = {"model": config_dict(cfg.model)}
    write_diffusers(Source(instantiate(cfg.model), config, Path("x"), None, True, 0), tmp_path)
    assert (tmp_path / "unet" / "network.py").is_file() and not (tmp_path / "scheduler").exists()
    assert "process = VP(" in (tmp_path / "pipeline.py").read_text()


def test_what_cannot_be_written(source, tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.Network is not of lit_gen|mine is not of lit_gen"):
        bundle(["mine.Network"])
    made = source("song")
    made.module.codec = object()
    with pytest.raises(ConfigError, match="latents"):
        write_diffusers(made, tmp_path)


def test_the_noise_of_1000_steps_is_that_of_the_process(source):
    module = source("ddpm").module
    betas = torch.tensor(betas_of(module, 1000), dtype=torch.float64)
    torch.testing.assert_close(
        betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert betas_of(source("song").module, 1000) is None
    json.dumps(betas_of(source("vp").module, 1000))
