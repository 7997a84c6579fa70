"""CPU time and memory of a training step and a forward pass of NCSN++ and DDPM++, against the plain way.

    python benchmarks/score_step.py --net ncsnpp --batch 4 --threads 2

The reference is the same network written as the official codes are (eager, contiguous NCHW, einsum attention,
attention layers by tensordot, resampling by zero insertion, padding and a convolution with one channel, loops
for Adam and the moving average) on the same weights; ours is the fused Adam. Both sides run in one process in
turn and are compared by CPU seconds; memory is measured with one side per process.

    python benchmarks/score_step.py --net ddpmpp --threads 1 --edm <clone of github.com/NVlabs/edm>

puts EDM's own SongUNet in the reference's place, in its own memory layout; all else is the same then.
"""

import argparse
import copy
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_gen.pretrained.edm import from_state_dict
from lit_gen.score.networks.ncsnpp import NCSNpp

NETWORKS = {
    "ddpmpp": {"image_size": 32},
    "ncsnpp": {"image_size": 32, "embedding": "fourier", "fir": (1, 3, 3, 1), "input_pyramid": "residual"},
    "digits": {"image_size": 8, "channels": 1, "base_channels": 32, "channel_mult": (1, 2), "num_blocks": 2,
               "attention_resolutions": (4,)},
}  # fmt: skip
# EDM's names for the two networks of CIFAR-10.
OFFICIAL = {
    "ddpmpp": {},
    "ncsnpp": {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
               "resample_filter": [1, 3, 3, 1]},
}  # fmt: skip


class Official(nn.Module):
    """SongUNet of the clone in `folder`, whose weights `net` takes."""

    def __init__(self, name: str, net: NCSNpp, folder: str):
        super().__init__()
        sys.path.insert(0, folder)
        from training.networks import SongUNet

        self.net = SongUNet(32, 3, 3, **OFFICIAL[name])
        randomize(self.net)
        from_state_dict(self.net.state_dict(), net)[0].train()

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        return self.net(x, noise_label, None)


class Reference(nn.Module):
    """The same function of the same parameters, contiguous and in the operations of score_sde_pytorch."""

    def __init__(self, net: NCSNpp):
        super().__init__()
        self.net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        self.fir = None if net.resample.box else self.net.resample.kernel[0, 0]

    def forward(self, x: Tensor, noise_label: Tensor, label: Tensor | None = None) -> Tensor:
        """`label`: one-hot rows (B, num_classes)."""
        net, image = self.net, x
        emb = net.noise.embedding(noise_label)
        if label is not None:
            emb = emb + net.noise.label(label * math.sqrt(net.noise.num_classes))
        emb = net.noise.out(F.silu(net.noise.hidden(emb)))
        h = net.stem(x)
        skips = [h]
        for level in net.encoder:
            if level.resize is not None:
                h = self.block(level.resize, h, emb)
                if level.pyramid is not None:
                    image = F.conv2d(self.upfirdn(image, 1, 1, (2, 2)), level.pyramid.conv.weight,
                                     level.pyramid.conv.bias, stride=2)  # fmt: skip
                    h = image = (h + image) / math.sqrt(2)
                skips.append(h)
            for block in level.blocks:
                h = self.block(block, h, emb)
                skips.append(h)
        for block in net.middle:
            h = self.block(block, h, emb)
        for level in net.decoder:
            if level.resize is not None:
                h = self.block(level.resize, h, emb)
            for block in level.blocks:
                h = self.block(block, torch.cat([h, skips.pop()], 1), emb)
        return net.decoder[-1].head(h)

    def block(self, b: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(b.norm0(x))
        if b.mode != "same":
            h, x = self.resample(h, b.mode), self.resample(x, b.mode)
        h = b.conv0(h) + b.affine(F.silu(emb))[:, :, None, None]
        h = b.conv1(F.dropout(F.silu(b.norm1(h)), b.dropout, self.training))
        h = (h + (x if b.skip is None else b.skip(x))) / math.sqrt(2)
        return h if b.attention is None else self.attention(b.attention, h) / math.sqrt(2)

    def attention(self, a: nn.Module, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = a.norm(x)
        q, k, v = (
            nin(h, w, bias) for w, bias in zip(a.qkv.weight.chunk(3), a.qkv.bias.chunk(3), strict=True)
        )
        w = torch.einsum("bchw,bcij->bhwij", q, k) * c**-0.5
        w = F.softmax(w.reshape(b, height, width, height * width), -1).reshape(
            b, height, width, height, width
        )
        return x + nin(torch.einsum("bhwij,bcij->bchw", w, v), a.proj.weight, a.proj.bias)

    def resample(self, x: Tensor, mode: str) -> Tensor:
        b, c, h, w = x.shape
        if self.fir is not None:
            return self.upfirdn(x, 2, 1, (2, 1)) if mode == "up" else self.upfirdn(x, 1, 2, (1, 1))
        if mode == "up":
            return x.reshape(b, c, h, 1, w, 1).repeat(1, 1, 1, 2, 1, 2).reshape(b, c, 2 * h, 2 * w)
        return x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))

    def upfirdn(self, x: Tensor, up: int, down: int, pad: tuple[int, int]) -> Tensor:
        b, c, h, w = x.shape
        x = F.pad(x.reshape(-1, h, 1, w, 1, 1), (0, 0, 0, up - 1, 0, 0, 0, up - 1)).reshape(
            -1, 1, h * up, w * up
        )
        out = F.conv2d(F.pad(x, (*pad, *pad)), (self.fir * up**2).flip(0, 1)[None, None])[
            :, :, ::down, ::down
        ]
        return out.reshape(b, c, *out.shape[2:])


def nin(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (torch.tensordot(x.permute(0, 2, 3, 1), weight.mT, 1) + bias).permute(0, 3, 1, 2)


class Trainer:
    """One training step on a fixed batch: noise regression, clipping, Adam, moving average.

    With `fused` the last two are one call each."""

    def __init__(self, net: nn.Module, x: Tensor, label: Tensor, fused: bool):
        self.net, self.x, self.label, self.fused = net, x, label, fused
        self.parameters = list(net.parameters())
        self.adam = torch.optim.Adam(self.parameters, 2e-4, fused=fused, foreach=None if fused else False)
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self) -> None:
        self.adam.zero_grad()
        self.net.train()(self.x, self.label).sub(self.x).square().mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        with torch.no_grad():
            if self.fused:
                torch._foreach_lerp_(self.average, self.parameters, 1e-4)
            else:
                for mean, p in zip(self.average, self.parameters, strict=True):
                    mean.sub_(1e-4 * (mean - p))


def build(name: str) -> NCSNpp:
    torch.manual_seed(0)
    net = NCSNpp(**NETWORKS[name])
    randomize(net)
    return net


def randomize(net: nn.Module) -> None:
    """New weights: no layer at zero."""
    for p in net.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.8 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1)


def sides(name: str, batch: int, edm: str | None = None) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    net = build(name)
    x = torch.randn(batch, net.channels, net.resolutions[0], net.resolutions[0])
    label = torch.rand(batch) if NETWORKS[name].get("embedding") == "fourier" else 999 * torch.rand(batch)
    return {"lit_gen": net, "reference": Official(name, net, edm) if edm else Reference(net)}, x, label


def cpu_seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turn(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, run in alternation after one warm-up."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(cpu_seconds(run))
    return {name: statistics.median(t) for name, t in times.items()}


def forward(net: nn.Module, x: Tensor, label: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            net.eval()(x, label)

    return run


def matmul_flops() -> float:
    """FLOP per CPU second of the machine's matrix product in float32, the best of a few."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    return 2 * 1536**3 / min(cpu_seconds(lambda: torch.mm(a, b)) for _ in range(8))


def flops(net: nn.Module, x: Tensor, label: Tensor) -> tuple[int, int]:
    """(forward, forward and backward) multiplications and additions of the network's own operations."""
    counter = FlopCounterMode(display=False)
    with counter:
        out = net(x, label)
        first = counter.get_total_flops()
        out.sum().backward()
    net.zero_grad()
    return first, counter.get_total_flops()


def peak_memory(arguments: argparse.Namespace, side: str, what: str) -> float:
    """GiB of a process of its own that does nothing but `what` on one side."""
    command = [sys.executable, __file__, "--net", arguments.net, "--batch", str(arguments.batch)]
    command += ["--threads", str(arguments.threads), "--only", f"{side}:{what}"]
    command += ["--edm", arguments.edm] if arguments.edm else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(name: str, batch: int, edm: str | None, side: str, what: str) -> float:
    nets, x, label = sides(name, batch, edm)
    net = nets.pop(side)
    nets.clear()
    fused = edm is not None or side == "lit_gen"
    run = Trainer(net, x, label, fused).step if what == "step" else forward(net, x, label)
    for _ in range(2):
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", choices=NETWORKS, default="ncsnpp")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--edm", help="folder of a clone of NVlabs/edm; its SongUNet is then the reference")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of memory")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        print(only(arguments.net, arguments.batch, arguments.edm, *arguments.only.split(":")))
        return
    if arguments.edm and arguments.net not in OFFICIAL:
        parser.error(f"--edm has no network for --net {arguments.net}; it has {', '.join(OFFICIAL)}.")
    nets, x, label = sides(arguments.net, arguments.batch, arguments.edm)
    with torch.no_grad():
        a, b = (net.eval()(x, label) for net in nets.values())
    print(
        f"{arguments.net}: outputs agree to {((a - b).abs().max() / b.abs().max()).item():.1e} of the largest"
    )
    peak, work = matmul_flops(), flops(nets["lit_gen"], x, label)
    runs = {
        "forward": {name: forward(net, x, label) for name, net in nets.items()},
        "step": {
            name: Trainer(net, x, label, arguments.edm is not None or name == "lit_gen").step
            for name, net in nets.items()
        },
    }
    print(f"matrix product: {peak / 1e9:.1f} GFLOP per CPU second")
    for i, (what, pair) in enumerate(runs.items()):
        seconds = in_turn(pair, arguments.repeats)
        share = work[i] / seconds["lit_gen"] / peak
        line = f"{what:8s} lit_gen {seconds['lit_gen']:.3f}  reference {seconds['reference']:.3f} CPU s"
        line += f"  ratio {seconds['lit_gen'] / seconds['reference']:.3f}"
        line += f"  {100 * share:.0f} % of the matrix-product peak"
        if not arguments.no_memory:
            memory = [peak_memory(arguments, side, what) for side in nets]
            line += f"  memory {memory[0]:.2f} / {memory[1]:.2f} GiB"
        print(line)


if __name__ == "__main__":
    main()
