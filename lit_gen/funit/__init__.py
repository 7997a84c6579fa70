"""FUNIT: few-shot unsupervised image-to-image translation (Liu et al. 2019,
https://arxiv.org/abs/1905.01723)."""
