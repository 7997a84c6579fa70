"""A step of the autoencoder and the decoding of its latents on a device: the host does not wait."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import torch

from lit_gen.autoencoder import AutoencoderKL, Codec, PatchDiscriminator
from lit_gen.autoencoder.codec import write_codec
from lit_gen.autoencoder.module import AutoencoderModule


def test_step(cuda):
    network, judge = AutoencoderKL(1, 2, (8, 16), 1, 4), PatchDiscriminator(1, 8, 1)
    made = AutoencoderModule(network, partial(torch.optim.Adam, lr=1e-3), (1, 16, 16), discriminator=judge)
    made = cuda.put(made)
    made._device = cuda.device
    made.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    made.optimizers = lambda: SimpleNamespace(param_groups=[{"lr": 1.0}])
    batch = cuda.put({"image": torch.rand(2, 1, 16, 16)})
    for _ in range(2):
        with cuda.counting() as waits:
            with cuda.autocast():
                loss = made.training_step(batch, 0)
            loss.backward()
    assert waits == [] and loss.dtype == torch.float32
    assert all(p.grad is not None for p in made.parameters())


def test_decoding(cuda, tmp_path):
    scale = {"mean": [0.0, 1.0], "std": [1.0, 2.0]}
    network = AutoencoderKL(1, 2, (8, 16), 1, 4)
    write_codec(tmp_path, network, (1, 16, 16), scale, factor=1.0, shift=0.0)
    codec, x = Codec(tmp_path), cuda.put(torch.randn(2, 2, 8, 8))
    codec._network = cuda.put(network)
    for _ in range(2):
        with cuda.counting() as waits:
            assert codec.decode(x).shape == (2, 1, 16, 16)
    assert waits == []
