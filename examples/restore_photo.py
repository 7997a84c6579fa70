"""Restores a photo of which most pixels are lost, with any denoiser: here a class of 11 lines, never trained.

    python examples/restore_photo.py --keep 0.3                        # a photo that comes with scikit-learn
    python examples/restore_photo.py photo.jpg --keep 0.5 --steps 60

The method is DiffPIR (Zhu et al. 2023, https://arxiv.org/abs/2305.08995). The denoiser of a trained model is
`lit_gen.load(RUN).module.denoiser`.
"""

import argparse

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from lit_gen.images import grid, save_png, to_float, to_uint8
from lit_gen.score import EDM, AbstractDenoiser
from lit_gen.score.restoration import Inpainting, diffpir


class PatchDenoiser(AbstractDenoiser):
    """Shrinks the cosine coefficients of all patches of 8x8 pixels by Wiener's factor."""

    process = EDM(t_max=1.0)  # x_t = x_0 + t z

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        n = torch.arange(8, dtype=x_t.dtype)
        dct = (torch.pi / 8 * (n + 0.5) * n[:, None]).cos() / torch.where(n > 0, 2, 8**0.5)[:, None]
        basis = torch.kron(dct, dct).reshape(64, 1, 8, 8)  # orthonormal
        c = F.conv2d(F.pad(x_t, (7, 7, 7, 7), mode="reflect").flatten(0, 1)[:, None], basis)
        c[:, 1:] *= c[:, 1:].square() / (c[:, 1:].square() + 9 * t**2)  # all but the patch's mean
        return F.conv_transpose2d(c, basis)[..., 7:-7, 7:-7].reshape(x_t.shape) / 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photo", nargs="?")
    parser.add_argument("--keep", type=float, default=0.3, help="fraction of pixels that are known")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="restored.png")
    args = parser.parse_args()
    photo = Image.open(args.photo) if args.photo else Image.fromarray(load_sample_image("china.jpg"))
    photo = ImageOps.fit(photo.convert("RGB"), (args.size, args.size))
    x = to_float(pil_to_tensor(photo))[None]  # (1, 3, H, W) in [-1, 1]

    denoiser, generator = PatchDenoiser(), torch.Generator().manual_seed(0)
    operator = Inpainting(torch.rand(1, *x.shape[2:], generator=generator) < args.keep)
    y, start = operator(x), denoiser.process.prior_sample(x.shape, generator)
    restored = diffpir(denoiser, start, operator, y, num_steps=args.steps, generator=generator)
    print(f"PSNR {10 * torch.log10(4 / (restored - x).square().mean()):.2f} dB; wrote", end=" ")
    print(save_png(grid(to_uint8(torch.cat([x, y, restored.float()])), columns=3), args.out))


if __name__ == "__main__":
    main()
