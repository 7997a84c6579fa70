"""PyTorch Lightning experiments for generative image models.

Three systems under one roof: score-based generation (`lit_gen.score`), few-shot image translation
(`lit_gen.funit`) and AutoAugment (`lit_gen.augment`). `python -m lit_gen.train` runs the default experiment.
"""

__version__ = "0.1.0"
