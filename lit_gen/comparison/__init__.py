"""Which augmentation is worth more? One task of few labelled images, many ways (arms) to make more of them.

task.py (the task, and the contract of an arm), arms.py (augmentations), diffusion.py and translations.py
(arms with a generator), study.py (the cells, resumable and shared by processes), results.py (means, paired
differences, costs).
"""

from lit_gen.comparison.arms import *
from lit_gen.comparison.diffusion import *
from lit_gen.comparison.study import *
from lit_gen.comparison.task import *
from lit_gen.comparison.translations import *
