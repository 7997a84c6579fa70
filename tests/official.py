"""Networks written in the layouts of the official releases, for the tests of the readers."""

from functools import partial

import torch
from torch import Tensor, nn

from lit_gen.pretrained import edm, keymap, ncsn, score_sde, transformers
from lit_gen.pretrained.keymap import Layout, Rule
from lit_gen.score.networks.edm2 import MPFourier, MPLinear


def invert(net: nn.Module, rules: list[Rule]) -> dict[str, Tensor]:
    """The official state dict of `net`, buffers that hold no weights left out."""
    own = net.state_dict()
    return {
        key: tensor.detach().clone().contiguous()
        for ours, keys, layout in rules
        for key, tensor in zip(keys, inverse(layout, own[ours], len(keys)), strict=True)
    }


def inverse(layout: Layout, t: Tensor, num: int) -> list[Tensor]:
    """The `num` official tensors of one of ours."""
    matrix = t.ndim > 1
    if isinstance(layout, partial):
        assert layout.func is edm.qkv_rows
        rows = t.unflatten(0, (3, layout.keywords["heads"], -1)).movedim(0, 2).flatten(0, 2)
        return [rows[:, :, None, None] if matrix else rows]
    return {
        keymap.same: lambda: [t],
        keymap.conv_as_linear: lambda: [t[:, :, None, None] if matrix else t],
        ncsn.half: lambda: [2 * t],
        score_sde.nin_as_linear: lambda: [part.T if matrix else part for part in t.chunk(num)],
        score_sde.nin_as_conv: lambda: [t.flatten(1).T if matrix else t],
    }[layout]()


def edm_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of EDM's or EDM2's network, without preconditioning and resampling filters."""
    return invert(net, edm.rules(net))


def ncsn_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of ncsn's or ncsnv2's model, without the table of sigmas."""
    return {f"module.{key}": tensor for key, tensor in invert(net, ncsn.rules(net)).items()}


def score_sde_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of score_sde_pytorch's model, without the table of sigmas.

    That of an unconditional network lacks what the official one has and does not use.
    """
    return {f"module.{key}": tensor for key, tensor in invert(net, score_sde.rules(net)).items()}


def transformer_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of U-ViT's, DiT's, or SiT's network."""
    return invert(net, transformers.rules(net))


class Uncertainty(nn.Module):
    """EDM2's u(noise_label), the log-variance by which its loss weights noise levels: (B,) -> (B,).

    Equation 21: loss exp(-u) + u, u a magnitude-preserving linear map of Fourier features.
    """

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        weight = state["logvar_linear.weight"].float()
        self.embedding, self.linear = MPFourier(weight.shape[1]), MPLinear(weight.shape[1], 1)
        self.embedding.frequencies = state["logvar_fourier.freqs"].float()
        self.embedding.phases = state["logvar_fourier.phases"].float()
        self.linear.weight = nn.Parameter(weight)

    @torch.no_grad()
    def forward(self, noise_label: Tensor) -> Tensor:
        return self.linear(self.embedding(noise_label))[:, 0]
