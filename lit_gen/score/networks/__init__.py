"""Networks: `net(x, noise_label, label=None, augment_label=None) -> (B, C, H, W)`, one paper a file."""

from lit_gen.score.networks.adm import *
from lit_gen.score.networks.classifier import *
from lit_gen.score.networks.ddpm import *
from lit_gen.score.networks.dit import *
from lit_gen.score.networks.edm2 import *
from lit_gen.score.networks.ncsn import *
from lit_gen.score.networks.ncsnpp import *
from lit_gen.score.networks.ncsnv2 import *
from lit_gen.score.networks.uvit import *
