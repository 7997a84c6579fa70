"""Distillation: a loss that asks the model which the training started from."""

import copy

import torch
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.condition import Label
from lit_gen.score.denoiser import Denoiser

__all__ = ["Distillation"]


class Distillation(nn.Module):
    """A loss with a `teacher` if it is to `distill`: a frozen copy of the denoiser as it was when the
    training started, in eval mode, which is stored in the checkpoints with the loss.

    With `tune` the training must start from a trained model, with a teacher or without.

    `guidance` other than 1 has the teacher guided by itself without conditions (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598), as `lit_gen.score.guidance.Guidance` with this weight. Raises
    ConfigError for guidance without a teacher.
    """

    started: Tensor

    def __init__(self, distill: bool = False, guidance: float = 1.0, tune: bool = False):
        super().__init__()
        if guidance != 1 and not distill:
            raise ConfigError(
                f"model.loss.guidance={guidance} is of the teacher: set model.loss.distill=true."
            )
        self.distill, self.guidance, self.tune = distill, guidance, tune
        self.teacher: Denoiser | None = None
        self.register_buffer("started", torch.tensor(False))  # from weights; kept for resumed runs

    def make_room(self, denoiser: Denoiser) -> None:
        """Takes a copy of the denoiser, whose weights are not those of the teacher yet."""
        if self.distill:
            self.teacher = copy.deepcopy(denoiser).requires_grad_(False).eval()

    def start_from(self, net: nn.Module) -> None:
        """The teacher gets the weights of `net`, with which the training starts."""
        if self.teacher is not None:
            self.teacher.net.load_state_dict(net.state_dict())
        self.started.fill_(True)

    def check_start(self, conditional: bool) -> None:
        """Raises ConfigError if the training starts from nothing and must not, and if an unconditional
        teacher is to be guided by itself."""
        if self.guidance != 1 and not conditional:
            raise ConfigError(
                f"model.loss.guidance={self.guidance} guides the teacher by itself without its condition, "
                "and this model has none: set model.loss.guidance=1."
            )
        if (self.distill or self.tune) and not self.started:
            option = "distill" if self.distill else "tune"
            raise ConfigError(
                f"model.loss.{option}=true starts from a trained model: give weights=<run folder, "
                f"checkpoint, or official file>, or set model.loss.{option}=false to train from nothing."
            )

    def networks(self) -> tuple[nn.Module, ...]:
        """The teacher's network, if there is one."""
        return () if self.teacher is None else (self.teacher.net,)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @torch.no_grad()
    def taught(
        self, x_t: Tensor, t: Tensor, label: Label = None, augment_label: Tensor | None = None
    ) -> Tensor:
        """The teacher's x0_hat (B, C, H, W), guided."""
        assert self.teacher is not None
        x0_hat = self.teacher(x_t, t, label, augment_label)
        if self.guidance == 1:
            return x0_hat
        return self.teacher(x_t, t, None, augment_label).lerp(x0_hat, self.guidance)
