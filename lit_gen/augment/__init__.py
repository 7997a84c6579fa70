"""AutoAugment: policies, their ops, and the transform."""

from lit_gen.augment.families import *
from lit_gen.augment.policy import *
from lit_gen.augment.transform import *
