"""`format=torch_export` and `format=onnx`: the denoiser as a program, which needs no code of its network.

Every model becomes D(x, sigma) -> x0_hat of x = x_0 + sigma z, EDM's form (Karras et al. 2022, Section 2,
https://arxiv.org/abs/2206.00364), whatever its process: a sampler then needs to know nothing else.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gen import runs
from lit_gen.errors import ConfigError
from lit_gen.export.source import Source, Usage
from lit_gen.score.condition import Condition
from lit_gen.score.denoiser import AbstractDenoiser, ReparameterizedDenoiser
from lit_gen.score.module import ScoreModule
from lit_gen.score.sde import EDM
from lit_gen.score.translation import TranslationModule

PROGRAM, ONNX = "denoiser.pt2", "denoiser.onnx"
_NOTES = """`x` is x_0 + sigma z with {what} and z normal, `sigma` is from {low:.4g}
to {high:.4g}, and the result is an estimate of x_0, for any number of images. On random inputs
the program{made} differs from lit_gen by at most {difference:.1g}. A step of Euler from sigma
to a smaller one is x + (smaller - sigma) (x - x_0) / sigma."""


class _Told(nn.Module):
    """The denoiser in noise levels, its conditions one by one."""

    def __init__(self, denoiser: AbstractDenoiser):
        super().__init__()
        self.denoiser = ReparameterizedDenoiser(denoiser, EDM())

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        others = vector is not None or image is not None
        return self.denoiser(x, sigma, Condition(label, vector, image) if others else label)


def exported_program(module: ScoreModule) -> tuple[Any, dict[str, Tensor], float]:
    """(program, inputs that it was traced with, largest difference on others) of a score model. Raises
    ConfigError for another model, and where torch cannot trace it."""
    if not isinstance(module, ScoreModule) or isinstance(module, TranslationModule):
        raise ConfigError(f"format=torch_export and onnx are of denoisers, not of a {type(module).__name__}.")
    module.refuse_consistency("A program of the denoiser", "take format=safetensors")
    denoiser, inputs = _Told(module.denoiser).eval(), _inputs(module, 2)
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        program = torch.export.export(
            denoiser, (), inputs, dynamic_shapes=dict.fromkeys(inputs, batch), strict=False
        )
    except Exception as error:  # every reason why torch cannot has a class of its own
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"torch.export cannot trace this model ({reason}): take format=safetensors."
        ) from error
    others = _inputs(module, 3)
    with torch.no_grad():
        difference = (program.module()(**others) - denoiser(**others)).abs().max()
    return program, inputs, float(difference)


def write_torch_export(source: Source, folder: Path) -> Usage:
    """`denoiser.pt2`, which `torch.export.load` reads, and `config.json`."""
    program, inputs, difference = exported_program(source.module)
    torch.export.save(program, folder / PROGRAM)
    notes = _write_config(source.module, folder, inputs, difference)
    lines = f'import torch\nD = torch.export.load({{here}} + "/{PROGRAM}").module()\nx_0 = D({_call(inputs)})'
    return Usage("pytorch", lines, notes)


def write_onnx(source: Source, folder: Path) -> Usage:
    """`denoiser.onnx`, by torch's own exporter, and `config.json`. Raises ConfigError where onnxscript is not
    installed."""
    if find_spec("onnxscript") is None:
        raise ConfigError("format=onnx needs onnxscript: pip install 'lit-gen[onnx]'.")
    program, inputs, difference = exported_program(source.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    size = sum(t.numel() * t.element_size() for t in source.module.denoiser.state_dict().values())
    onnx.save(str(folder / ONNX), external_data=size > 2**30)  # a file of protobuf has 2 GiB at most
    made = " of torch that this file was made of"
    notes = _write_config(source.module, folder, inputs, difference, made)
    given = ", ".join(f'"{name}": {name}' for name in inputs)
    lines = (
        "import onnxruntime\n"
        f'D = onnxruntime.InferenceSession({{here}} + "/{ONNX}")\n'
        f"x_0 = D.run(None, {{{given}}})[0]  # of NumPy"
    )
    return Usage("onnx", lines, notes)


def _inputs(module: ScoreModule, n: int) -> dict[str, Tensor]:
    """Random ones for n images, of noise levels that the model knows."""
    low, high = _levels(module)
    low, high = max(low, 1e-3), min(high, 1e3)  # 0 and infinity are ends of some processes
    generator = torch.Generator().manual_seed(n)
    sigma = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), n)
    x = torch.randn((n, *module.image_shape), generator=generator) * sigma[:, None, None, None]
    inputs = {"x": x, "sigma": sigma}
    if module.num_classes:
        inputs["label"] = torch.arange(n) % module.num_classes
    if module.vector_dim:
        inputs["vector"] = torch.randn((n, module.vector_dim), generator=generator)
    if module.condition_channels:
        shape = (n, module.condition_channels, *module.image_shape[1:])
        inputs["image"] = torch.rand(shape, generator=generator) * 2 - 1
    return inputs


def _levels(module: ScoreModule) -> tuple[float, float]:
    process = module.denoiser.process
    low, high = process.noise_level(
        torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    ).tolist()
    return low, high


def _write_config(
    module: ScoreModule, folder: Path, inputs: dict[str, Tensor], difference: float, made: str = ""
) -> str:
    low, high = _levels(module)
    shapes = {n: {"dtype": str(t.dtype)[6:], "shape": ["batch", *t.shape[1:]]} for n, t in inputs.items()}
    record = {"inputs": shapes, "sigma_min": low, "sigma_max": high, "num_classes": module.num_classes}
    runs.write_json(folder / runs.CONFIG, runs.spelled(record))
    what = "images x_0 in [-1, 1]" if module.codec is None else "latents x_0 (without their decoder)"
    return _NOTES.format(what=what, low=low, high=high, made=made, difference=difference)


def _call(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name}={name}" for name in inputs)
