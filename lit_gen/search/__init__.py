"""The search for augmentation policies.

space.py (what may be chosen), methods.py and ppo.py (what chooses), rewards.py (what a choice is worth),
generative.py (both for generative training), loop.py (`run`), shared.py (`run_shared`: many processes, one
study), density.py (the folds of Fast AutoAugment).
"""

from lit_gen.search.density import *
from lit_gen.search.generative import *
from lit_gen.search.loop import *
from lit_gen.search.methods import *
from lit_gen.search.ppo import *
from lit_gen.search.rewards import *
from lit_gen.search.shared import *
from lit_gen.search.space import *
