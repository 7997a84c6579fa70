"""The search for augmentation policies.

space.py (what may be chosen), methods.py and ppo.py (what chooses), rewards.py (what a choice is worth),
loop.py (`run`), shared.py (`run_shared`: many processes, one study), density.py (the folds of Fast
AutoAugment).
"""

from lit_gen.search.density import density_folds
from lit_gen.search.loop import Result, Reward, Trial, run
from lit_gen.search.methods import TPE, Grid, Method, Random
from lit_gen.search.ppo import PPO
from lit_gen.search.rewards import ClassifierReward, DensityReward, Labelled, SyntheticReward
from lit_gen.search.shared import run_shared
from lit_gen.search.space import (
    PolicySpace,
    RandAugmentSpace,
    Space,
    classification_space,
    detection_space,
    merge,
)

__all__ = [
    "PPO",
    "TPE",
    "ClassifierReward",
    "DensityReward",
    "Grid",
    "Labelled",
    "Method",
    "PolicySpace",
    "RandAugmentSpace",
    "Random",
    "Result",
    "Reward",
    "Space",
    "SyntheticReward",
    "Trial",
    "classification_space",
    "density_folds",
    "detection_space",
    "merge",
    "run",
    "run_shared",
]
