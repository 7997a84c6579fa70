"""Trains a score model in a plain PyTorch loop, without Lightning or Hydra, and draws samples from it.

    python examples/train_score_model.py
    python examples/train_score_model.py --steps 20 --out tiny.png

The model is EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364) on scikit-learn's digits (8x8 pixels).
"""

import argparse

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_gen.data import digits
from lit_gen.images import grid, save_png, to_float, to_uint8
from lit_gen.score import EDM, Denoiser, EDMPrecondition, edm_loss
from lit_gen.score.networks import NCSNpp
from lit_gen.score.samplers import heun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--sampler-steps", type=int, default=18)
    parser.add_argument("--out", default="digits.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    data = digits("train")
    images, labels = to_float(data.images).to(device), data.labels.to(device)  # (N, 1, 8, 8) in [-1, 1]; (N,)
    net = NCSNpp(8, 1, 24, (1, 2), num_blocks=1, attention_resolutions=(), num_classes=10)
    denoiser = Denoiser(net, EDM(), EDMPrecondition(sigma_data=0.7)).to(device)
    loss_of = edm_loss(P_mean=-1.0, sigma_data=0.7)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.steps)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.995))

    for step in range(args.steps):
        rows = torch.randint(len(images), (64,), device=device)
        draws = loss_of.draw(denoiser.process, images[rows])  # noise levels (64,), noise (64, 1, 8, 8)
        loss = loss_of(denoiser, images[rows], *draws, label=labels[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(denoiser)
        if (step + 1) % max(args.steps // 10, 1) == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")

    noise = denoiser.process.prior_sample((100, 1, 8, 8), device=device)
    label = torch.arange(100, device=device) % 10
    samples = heun(average.module.eval(), noise, num_steps=args.sampler_steps, label=label)
    print("wrote", save_png(grid(to_uint8(samples), columns=10, scale=4), args.out))


if __name__ == "__main__":
    main()
