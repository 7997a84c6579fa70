"""`format=diffusers`: a folder that diffusers loads without lit_gen.

network     UNet2DModel where diffusers has the same function (`lit_gen.pretrained.unet2d`), else our own,
            with all that it needs, in `network.py`, which imports torch alone
pipeline    DDIMPipeline for noise-predicting variance-preserving models, ScoreSdeVePipeline for NCSN++ on
            VE; else `pipeline.py`, with our samplers
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lit_gen import runs
from lit_gen.errors import ConfigError
from lit_gen.export.bundle import bundle
from lit_gen.export.loadable import CONFIG, WEIGHTS
from lit_gen.export.source import Source, Usage, tensors_of
from lit_gen.funit.module import FUNITModule
from lit_gen.pretrained import unet2d
from lit_gen.score.denoiser import Denoiser
from lit_gen.score.fewstep.teacher import Distillation
from lit_gen.score.module import ScoreModule
from lit_gen.score.networks import NCSNpp
from lit_gen.score.precondition import LogNoiseLevel, PredictNoise, PredictScaledScore
from lit_gen.score.sde import VE
from lit_gen.score.translation import TranslationModule

VERSION = "0.30.0"  # of diffusers, the oldest that the folders are meant for
PIPELINES = "lit_gen.export.pipelines"
_TRUSTED = """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({here}, trust_remote_code=True)"""
_CODE = "`trust_remote_code=True` runs `pipeline.py`{}: parts of lit_gen, which need not be installed."


def write_diffusers(source: Source, folder: Path) -> Usage:
    """Raises ConfigError for a model of latents, and for one that neither samples nor translates."""
    module = source.module
    if isinstance(module, FUNITModule):
        node = source.config["model"]["generator"]
        _write_network(node, module.generator_ema, folder / "generator")
        _write_pipeline(folder, "TranslationPipeline", "generator", ["network", "Network"], {})
        return _translates("generator")
    if not isinstance(module, ScoreModule):
        raise ConfigError(f"format=diffusers: a {type(module).__name__} neither samples nor translates.")
    if module.codec is not None:
        raise ConfigError("format=diffusers is for models of pictures, not of latents: format=safetensors.")
    if isinstance(module.loss, Distillation) or type(module.denoiser) is not Denoiser:
        raise ConfigError(
            "format=diffusers is not for models of few steps, which do not denoise: format=safetensors."
        )
    pipeline, unet = _write_unet(source, folder)
    if pipeline is not None:
        index = {
            "_class_name": pipeline[0],
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", pipeline[1]],
        }
        runs.write_json(folder / "model_index.json", index | {"unet": unet})
        lines = f"from diffusers import {pipeline[0]}\npipe = {pipeline[0]}.from_pretrained({{here}})"
        return Usage("diffusers", f"{lines}\nimages = pipe(batch_size=4).images")
    model = source.config["model"]
    attributes = {
        "process": literal(model["process"]),
        "precondition": literal(model["precondition"]),
        "sampler": f"staticmethod({literal(model.get('sampler') or source.config['sampler'])})",
        "shape": repr(tuple(module.image_shape)),
        "num_classes": repr(module.num_classes),
        "center": repr(getattr(module, "center", 0.0)),
    }
    translates = isinstance(module, TranslationModule)
    targets = [*_targets(model["process"]), *_targets(model["precondition"])]
    targets += _targets(model.get("sampler") or source.config["sampler"])
    kind = "StylePipeline" if translates else "SamplePipeline"
    _write_pipeline(folder, kind, "unet", unet, attributes, targets)
    if translates:
        return _translates("unet")
    files = "" if unet[0] == "diffusers" else " and `unet/network.py`"
    return Usage("diffusers", f"{_TRUSTED}\nimages = pipe(batch_size=4).images", _CODE.format(files))


def _translates(part: str) -> Usage:
    use = "images = pipe(content, class_images).images  # of PIL, or float (N, C, H, W) in [-1, 1]"
    return Usage("diffusers", f"{_TRUSTED}\n{use}", _CODE.format(f" and `{part}/network.py`"))


def _write_unet(source: Source, folder: Path) -> tuple[tuple[str, str] | None, list[str]]:
    """Writes the folder `unet`, and `scheduler` where diffusers samples the model itself. (names of its
    pipeline and scheduler if it does, what model_index.json says of the network)."""
    net = source.module.denoiser.net
    try:
        config = unet2d.unet_config(net)
    except ConfigError:
        config = None
    pipeline = None if config is None else _stock_pipeline(source.module, folder)
    if config is None or (isinstance(net, NCSNpp) and pipeline is None):  # whose UNet2DModel divides by sigma
        _write_network(source.config["model"]["net"], net, folder / "unet")
        return None, ["network", "Network"]
    (folder / "unet").mkdir()
    height, width = source.module.image_shape[1:]
    config |= {"sample_size": height if height == width else [height, width], "_diffusers_version": VERSION}
    runs.write_json(folder / "unet" / CONFIG, config)
    save_file(unet2d.state_dict(net), folder / "unet" / WEIGHTS, {"format": "pt"})
    return pipeline, ["diffusers", "UNet2DModel"]


def _stock_pipeline(module: ScoreModule, folder: Path) -> tuple[str, str] | None:
    """Writes the scheduler of a pipeline of diffusers' that samples the model; the names of both, if there
    are such."""
    process, precondition, net = module.denoiser.process, module.denoiser.precondition, module.denoiser.net
    _, height, width = module.image_shape
    if isinstance(net, NCSNpp):
        if precondition != PredictScaledScore(LogNoiseLevel(1.0, 2.0)) or height != width:
            return None
        if not isinstance(process, VE):
            return None
        levels = {"sigma_min": process.sigma_min / 2, "sigma_max": process.sigma_max / 2}  # on [0, 1] images
        steps = {"num_train_timesteps": 2000, "snr": 0.15, "sampling_eps": 1e-5, "correct_steps": 1}
        return "ScoreSdeVePipeline", _write_scheduler(folder, "ScoreSdeVeScheduler", levels | steps)
    predicts = (
        isinstance(precondition, PredictNoise) and getattr(net, "out_channels", 0) == module.image_shape[0]
    )
    betas = betas_of(module, 1000) if predicts and not module.num_classes else None
    if betas is None:
        return None
    options = {"num_train_timesteps": 1000, "trained_betas": betas, "prediction_type": "epsilon"}
    options |= {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    return "DDIMPipeline", _write_scheduler(folder, "DDIMScheduler", options)


def _write_scheduler(folder: Path, name: str, options: Mapping[str, Any]) -> str:
    (folder / "scheduler").mkdir()
    config = {"_class_name": name, "_diffusers_version": VERSION, **options}
    runs.write_json(folder / "scheduler" / "scheduler_config.json", config)
    return name


def betas_of(module: ScoreModule, steps: int) -> list[float] | None:
    """The noise that `steps` steps add to a variance-preserving model, which is told step k as c_noise = k;
    None for any other model."""
    process, precondition = module.denoiser.process, module.denoiser.precondition
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    told = precondition(process, ends)[3].to(torch.float64)
    slope = (told[1] - told[0]) / (ends[1] - ends[0])
    k = torch.arange(steps, dtype=torch.float64)
    t = ends[1] + (k - told[1]) / slope
    if not bool(slope > 0) or not torch.allclose(precondition(process, t[1:])[3].double(), k[1:], atol=1e-6):
        return None
    signal = process.alpha(t).square()
    if not torch.allclose(signal + process.sigma(t).square(), torch.ones_like(t), atol=1e-9):
        return None
    return (1 - signal / torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])).clamp(min=0).tolist()


def _write_network(node: Mapping[str, Any], net: nn.Module, folder: Path) -> None:
    """Our own network: `network.py`, `config.json`, and weights."""
    folder.mkdir()
    target = str(node["_target_"])
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    kind = f"class Network(Loadable, {target.rpartition('.')[2]}):\n"
    kind += '    """The network of this folder."""\n\n    from_lit_gen = True'
    text = bundle([target, "lit_gen.export.loadable.Loadable"], kind)
    (folder / "network.py").write_text(text, encoding="utf-8")
    runs.write_json(folder / CONFIG, {"_class_name": "Network", "arguments": arguments})
    save_file(tensors_of(net), folder / WEIGHTS, {"format": "pt"})


def _write_pipeline(
    folder: Path,
    kind: str,
    part: str,
    network: list[str],
    attributes: Mapping[str, str],
    targets: list[str] | None = None,
) -> None:
    lines = [f"class Pipeline({kind}):", '    """The pipeline of this folder."""', ""]
    lines += [f"    {name} = {value}" for name, value in attributes.items()]
    text = bundle([f"{PIPELINES}.{kind}", *(targets or ())], "\n".join(lines).rstrip())
    (folder / "pipeline.py").write_text(text, encoding="utf-8")
    index = {"_class_name": ["pipeline", "Pipeline"], "_diffusers_version": VERSION, part: network}
    runs.write_json(folder / "model_index.json", index)


def literal(node: Any) -> str:
    """A configuration as the Python that makes the same: {"_target_": "a.b.C", "x": 1} as C(x=1)."""
    if isinstance(node, Mapping):
        if "_target_" not in node:
            return "{" + ", ".join(f"{key!r}: {literal(value)}" for key, value in node.items()) + "}"
        name = str(node["_target_"]).rpartition(".")[2]
        options = [literal(value) for value in node.get("_args_", ())]
        options += [f"{k}={literal(v)}" for k, v in node.items() if not k.startswith("_")]
        return (
            f"partial({', '.join([name, *options])})"
            if node.get("_partial_")
            else f"{name}({', '.join(options)})"
        )
    if isinstance(node, list | tuple):
        return "[" + ", ".join(map(literal, node)) + "]"
    return f'float("{node}")' if isinstance(node, float) and not math.isfinite(node) else repr(node)


def _targets(node: Any) -> list[str]:
    """All targets of a configuration, and what calls them."""
    if isinstance(node, Mapping):
        own = [str(node["_target_"])] if "_target_" in node else []
        return [*own, *(target for value in node.values() for target in _targets(value))]
    return [target for value in node for target in _targets(value)] if isinstance(node, list | tuple) else []
