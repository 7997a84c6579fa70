"""The goldens of few-step generators (goldens/fewstep, see its README): cases by their JSON, networks of the
official codes as functions of the official tensors."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_gen.pretrained import edm
from lit_gen.rng import PerSample

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parent / "goldens") / "fewstep"


class Case:
    """One JSON and its arrays."""

    def __init__(self, path: Path):
        self.stem, self.json = path.with_suffix(""), json.loads(path.read_text())

    def __repr__(self):
        return self.stem.name

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return {k: torch.from_numpy(v) for k, v in np.load(f"{self.stem}.io.npz").items()}

    def draw(self, number: int) -> Tensor:
        """The recorded random numbers of this call."""
        (found,) = (v for k, v in self.io.items() if k.startswith(f"draw{number:03}_"))
        return found

    @property
    def labels(self) -> Tensor | None:
        return self.io.get("class_labels")


def cases(*kinds: str) -> list[Case]:
    return [case for p in sorted(FOLDER.glob("*.json")) if (case := Case(p)).json["kind"] in kinds]


class Official(nn.Module):
    """Our network with the official tensors as its parameters, in float64: gradients are those of the
    official parameters."""

    def __init__(self, weights: str, options: dict):
        super().__init__()
        state = {
            k: v.double()
            for k, v in load(weights).items()
            if "logvar" not in k and "resample_filter" not in k
        }
        net, _ = edm.from_state_dict(state, hidden=edm.hidden_arguments(options))
        object.__setattr__(self, "template", net.double().train())  # no parameters of this module
        self.names = {k.removeprefix("model."): k for k in state}
        self.rules = edm.rules(net)
        self.tensors = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(v) for k, v in state.items()})
        for key, p in self.tensors.items():
            p.requires_grad_(not key.endswith("freqs"))

    def forward(self, *args, **labels) -> Tensor:
        self.template.train(self.training)
        tensors = {short: self.tensors[full.replace(".", "/")] for short, full in self.names.items()}
        own = {ours: layout(*(tensors[k] for k in keys)) for ours, keys, layout in self.rules}
        return functional_call(self.template, own, args, labels)

    def gradients(self) -> dict[str, Tensor | None]:
        """By official name."""
        return {key.replace("/", "."): p.grad for key, p in self.tensors.items() if p.requires_grad}


@cache
def load(weights: str) -> dict[str, Tensor]:
    return torch.load(FOLDER / weights, map_location="cpu", weights_only=True)


class Replay(PerSample):
    """A generator that gives recorded numbers, in their order and precision."""

    def __init__(self, *numbers: Tensor):
        self.numbers = list(numbers)

    def _stack(self, fill, shape, device, dtype):
        return self.numbers.pop(0).reshape(shape)


@contextmanager
def recorded_dropout(case: Case, calls: int) -> Iterator[None]:
    """`nn.functional.dropout` with the recorded masks, the same ones in each of the network's calls."""
    kept = [case.io[k] for k in sorted(case.io) if k.startswith("dropout_keep")]
    left = kept * calls

    def dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        return x * left.pop(0) / (1 - p) if training and p else x

    original = nn.functional.dropout
    nn.functional.dropout = dropout
    try:
        yield
    finally:
        nn.functional.dropout = original
    assert not left


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number."""
    assert actual.shape == expected.shape
    assert (actual.detach() - expected).abs().max() <= tolerance * expected.abs().max()


def gradients_match(case: Case, net: Official, tolerance: float, **others: Tensor | None) -> None:
    """Of the loss that has been backpropagated: whole tensors, all norms, and that of all together; `others`
    are gradients of parameters outside of `net`, by official name."""
    found = net.gradients() | others
    for key, expected in case.io.items():
        if key.startswith("grad:"):
            gradient = found[key.removeprefix("grad:")]
            assert gradient is not None
            close(gradient, expected, tolerance)
    norms = {name: 0.0 if g is None else g.norm().item() for name, g in found.items()}
    total = torch.tensor(list(norms.values()), dtype=torch.float64).norm().item()
    for name, expected in case.json["grad_l2"].items():
        if name in found or "logvar" not in name:
            assert abs(norms[name] - (expected or 0.0)) <= tolerance * total, name
    assert abs(total - case.json["grad_global_l2"]) <= tolerance * total
