"""U-ViT, DiT, and SiT against numbers of the official codes; see the README beside them, in
goldens/transformers.

Generic over what lies in the folder: a case is a .json with its .io.npz and .state_dict.pt.
"""

import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gen.pretrained import transformers, unpickle
from lit_gen.score.networks.dit import DiT
from lit_gen.score.networks.uvit import UViT

pytestmark = pytest.mark.parity

FOLDER = Path(os.environ.get("LITGEN_GOLDENS") or Path(__file__).parents[2] / "goldens") / "transformers"
OPTIONS = {
    "img_size": "image_size",
    "input_size": "image_size",
    "in_chans": "channels",
    "in_channels": "channels",
    "embed_dim": "width",
    "hidden_size": "width",
    "num_heads": "heads",
    "mlp_time_embed": "time_mlp",
} | {name: name for name in ("patch_size", "depth", "mlp_ratio", "qkv_bias", "skip", "conv", "num_classes")}
IGNORED = {"use_checkpoint", "norm_layer", "qk_scale", "class_dropout_prob", "learn_sigma"}


def network(cls: str, official: dict, **options):
    """Our network of the official class and constructor arguments."""
    arguments = {OPTIONS[key]: value for key, value in official.items() if key not in IGNORED}
    if cls == "UViT":
        defaults = {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12}
        arguments["num_classes"] = max(arguments.get("num_classes", -1), 0)
        return UViT(**defaults | arguments | options)
    defaults = {"image_size": 32, "channels": 4, "width": 1152, "depth": 28, "heads": 16, "num_classes": 1000}
    arguments = defaults | arguments
    dropout = official.get("class_dropout_prob", 0.1)
    channels = arguments["channels"] * (1 + official.get("learn_sigma", True))
    return DiT(**arguments, null_class=dropout > 0, out_channels=channels, **options)


class Case:
    """One golden network, read when first asked for."""

    def __init__(self, path: Path):
        self.stem, self.json = path.with_suffix(""), json.loads(path.read_text())

    def __repr__(self):
        return self.stem.name

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return {k: torch.from_numpy(v) for k, v in np.load(f"{self.stem}.io.npz").items()}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return {k: v.float() for k, v in unpickle.load(f"{self.stem}.state_dict.pt").items()}

    @property
    def null(self) -> int | None:
        """The label that our network is told by -1."""
        return self.json["null_label"] if self.json["class"] != "UViT" else None

    def net(self, dtype: torch.dtype, **options):
        net = network(self.json["class"], self.json["constructor_kwargs"], **options)
        net, _ = transformers.read(self.state, net)
        return net.to(dtype)

    def label(self, y: Tensor) -> Tensor:
        return y if self.null is None else y.masked_fill(y == self.null, -1)

    def __call__(self, net, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """What the official network says: SiT drops its second half of channels."""
        dtype = next(net.parameters()).dtype
        out = net(x.to(dtype), t.to(dtype), None if y is None else self.label(y))
        return out[:, : x.shape[1]] if self.json["class"] == "SiT" else out


CASES = [Case(p) for p in sorted(FOLDER.glob("*.json")) if p.with_suffix(".io.npz").is_file()]
COUNTS = FOLDER / "parameter_counts.json"
each_case = pytest.mark.parametrize("case", CASES, ids=repr)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    assert (actual.detach() - expected).abs().max().item() <= tolerance * scale


@each_case
def test_output(case):
    for dtype, key, tolerance in (
        (torch.float32, "out", 1e-5),
        (torch.float64, "out_float64", 1e-5),
        (torch.float64, "out_float64_exact_embedding", 1e-14),
    ):
        if key in case.io:
            out = case(case.net(dtype), case.io["x"], case.io["t"], case.io.get("y"))
            close(out, case.io[key], tolerance)


@each_case
def test_gradients(case):
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_float64")):
        net, x = case.net(dtype), case.io["x"].clone().to(dtype).requires_grad_()
        (case(net, x, case.io["t"], case.io.get("y")) * case.io["grad_cotangent"]).sum().backward()
        close(x.grad, case.io["grad_x" + suffix], 1e-5)
        ours = {theirs[0]: ours for ours, theirs, _ in transformers.rules(net)}
        parameters = dict(net.named_parameters())
        norms = case.json["grad_l2" + suffix]
        assert set(norms) == {theirs for theirs, name in ours.items() if name in parameters}
        floor = 1e-5 * max(norms.values())
        for name, norm in norms.items():
            grad = parameters[ours[name]].grad
            assert grad.norm().item() == pytest.approx(norm, rel=2e-4, abs=floor), name
            if f"grad:{name}" in case.io:
                close(grad, case.io[f"grad:{name}"], 1e-4)


@each_case
def test_parameters_and_their_number(case):
    net = case.net(torch.float32)
    trainable = sum(p.numel() for p in net.parameters())
    assert trainable == case.json["trainable"]
    assert sum(t.numel() for t in net.state_dict().values()) == case.json["params"]


@each_case
def test_architecture_is_read_off_the_file(case):
    """But for what it cannot tell."""
    net, arguments = case.net(torch.float32), case.json["constructor_kwargs"]
    told = {"heads": arguments["num_heads"]}
    if hasattr(net.label, "null"):
        told["null_class"] = net.label.null
    read, info = transformers.read(case.state, **told)
    assert info.network["image_size"] == arguments.get("img_size", arguments.get("input_size"))
    x, t, y = (case.io.get(key) for key in ("x", "t", "y"))
    assert torch.equal(case(read, x, t, y), case(net, x, t, y))


@each_case
def test_fixed_positions(case):
    if case.json["class"] != "UViT":
        own = network(case.json["class"], case.json["constructor_kwargs"]).positions
        torch.testing.assert_close(own, case.state["pos_embed"], rtol=0, atol=1e-7)


@each_case
def test_dropped_labels(case):
    """In training: what the module leaves out is the official null label."""
    if "train_drop_u" not in case.io:
        pytest.skip("a case without dropped labels")
    io, p = case.io, case.json["constructor_kwargs"]["class_dropout_prob"]
    y = io["y"].repeat(len(io["train_drop_u"]) // len(io["y"]))
    dropped = io["train_drop_u"] < p
    assert torch.equal(y.masked_fill(dropped, case.null), io["train_labels_after_drop"])
    assert int((y != io["train_labels_after_drop"]).sum()) <= case.json["train_rows_dropped"]
    rows = torch.nn.functional.one_hot(case.label(y).clamp(min=0), case.net(torch.float32).num_classes)
    rows = rows * ((y != case.null) & ~dropped)[:, None]  # as ScoreModule drops them
    net, times = case.net(torch.float64).train(), len(y) // len(io["y"])
    x, t = io["x"].repeat(times, 1, 1, 1).double(), io["t"].repeat(times).double()
    out = net(x, t, rows.double())
    out = out[:, : x.shape[1]] if case.json["class"] == "SiT" else out
    close(out.flatten(1).mean(1), io["train_out_mean_per_row"], 1e-5)


@pytest.mark.skipif(not COUNTS.is_file(), reason="no parameter_counts.json")
def test_official_sizes():
    for name, golden in json.loads(COUNTS.read_text()).items():
        with torch.device("meta"):
            net = network(golden["class"], golden["constructor_kwargs"])
        assert sum(p.numel() for p in net.parameters()) == golden["trainable"], name
        assert sum(t.numel() for t in net.state_dict().values()) == golden["params"], name
