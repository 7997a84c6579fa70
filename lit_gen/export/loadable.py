"""What a network in an exported folder has besides being one. It is written there, so it knows torch
alone."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class Loadable(nn.Module):
    """A network that diffusers takes for one of its own."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_: Any) -> Any:
        """The network of a folder, in eval mode; `config.json` has its arguments. What else diffusers says of
        how to load is for larger models."""
        from safetensors.torch import load_file

        arguments = json.loads((Path(folder) / CONFIG).read_text())["arguments"]
        network = cls(**arguments)
        network.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return network.to(torch_dtype or torch.float32).eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
