"""Autoencoders: images as latents of fewer numbers, and back."""

from lit_gen.autoencoder.codec import Codec
from lit_gen.autoencoder.networks import AutoencoderKL, PatchDiscriminator

__all__ = ["AutoencoderKL", "Codec", "PatchDiscriminator"]
