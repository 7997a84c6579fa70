"""Networks: `net(x, noise_label, label=None, augment_label=None) -> (B, C, H, W)`, one paper a file."""

from lit_gen.score.networks.adm import ADM
from lit_gen.score.networks.classifier import NoisyClassifier
from lit_gen.score.networks.ddpm import DDPM
from lit_gen.score.networks.edm2 import EDM2
from lit_gen.score.networks.ncsn import NCSN
from lit_gen.score.networks.ncsnpp import NCSNpp
from lit_gen.score.networks.ncsnv2 import NCSNv2

__all__ = ["ADM", "DDPM", "EDM2", "NCSN", "NCSNpp", "NCSNv2", "NoisyClassifier"]
