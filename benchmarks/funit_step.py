"""CPU time and peak memory of one FUNIT iteration, against the same mathematics in the official order.

    python benchmarks/funit_step.py [--width 32] [--size 64] [--batch 2] [--rounds 5]

The official order runs the generator in both turns, enlarges images before it convolves them, keeps a graph
of real images, computes discriminator gradients in the generator's turn and calls backward four times. Both
sides have the same weights and take turns in one process, on one thread; the table gives the median CPU
seconds. Memory is the peak resident set of a fresh process per side, the libraries' own included.
"""

import argparse
import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gen.funit import losses
from lit_gen.funit.networks import FewShotGenerator, PatchDiscriminator, UpsampleConv
from lit_gen.funit.step import Batch, Objective, alternating_step, average_


class EnlargeThenConvolve(UpsampleConv):
    def forward(self, x: Tensor) -> Tensor:
        enlarged = F.interpolate(x, scale_factor=2.0)
        return F.conv2d(F.pad(enlarged, (2, 2, 2, 2), mode="reflect"), self.weight, self.bias)


class Training:
    def __init__(self, width: int, size: int, batch: int):
        torch.manual_seed(0)
        self.generator = FewShotGenerator(width=width)
        self.average = copy.deepcopy(self.generator)
        self.discriminator = PatchDiscriminator(119, width=width, max_width=16 * width)
        self.optimizers = {
            "generator": torch.optim.RMSprop(self.generator.parameters(), lr=1e-4, weight_decay=1e-4),
            "discriminator": torch.optim.RMSprop(self.discriminator.parameters(), lr=1e-4, weight_decay=1e-4),
        }
        images, labels = torch.rand(2, batch, 3, size, size) * 2 - 1, torch.randint(119, (2, batch))
        self.batch = Batch(images[0], labels[0], images[1], labels[1])

    def update(self, which: str, parts: losses.Parts | None = None) -> None:
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def ours(self) -> None:
        networks, objective = (self.generator, self.discriminator), Objective()
        alternating_step(*networks, self.batch, objective, lambda loss: loss.backward(), self.update)
        average_(self.average, self.generator)

    def like_the_official_code(self) -> "Training":
        for layer in self.generator.decoder.up:
            layer.__class__ = EnlargeThenConvolve
        return self

    def official_order(self) -> None:
        g, d, (content, content_label, classes, class_label) = self.generator, self.discriminator, self.batch
        # Discriminator: three backward passes.
        self.optimizers["discriminator"].zero_grad()
        classes.requires_grad_()
        real, _ = d(classes, class_label)
        (1 - real).relu().mean().backward(retain_graph=True)
        losses.gradient_penalty(real, classes)[0].backward()
        with torch.no_grad():
            translated = g(content, classes)
        fake, _ = d(translated, class_label)
        (1 + fake).relu().mean().backward()
        self.optimizers["discriminator"].step()
        # Generator: everything again, one image batch at a time, with gradients everywhere.
        self.optimizers["generator"].zero_grad()
        code = g.content_code(content)
        code_content, code_class = g.class_code(content), g.class_code(classes)
        translated, reconstructed = g.decode(code, code_class), g.decode(code, code_content)
        fake_t, features_t = d(translated, class_label)
        fake_r, features_r = d(reconstructed, content_label)
        _, features_b = d(classes, class_label)
        _, features_a = d(content, content_label)
        adversarial, _ = losses.hinge_generator(fake_t, fake_r)
        pixels, _ = losses.reconstruction(reconstructed, content)
        matching, _ = losses.feature_matching(features_t, features_b, features_r, features_a)
        (adversarial + 0.1 * pixels + matching).backward()
        self.optimizers["generator"].step()
        average_(self.average, g)


def step_of(side: str, arguments: tuple[int, int, int]) -> Callable[[], None]:
    training = Training(*arguments)
    return training.ours if side == "ours" else training.like_the_official_code().official_order


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def peak_mib(side: str, arguments: tuple[int, int, int], connection) -> None:
    torch.set_num_threads(1)
    step = step_of(side, arguments)
    for _ in range(2):
        step()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure_memory(side: str, arguments: tuple[int, int, int]) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_mib, args=(side, arguments, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 32), ("size", 64), ("batch", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    arguments = (options.width, options.size, options.batch)
    sides = ("official order", "ours")
    peaks = {
        side: measure_memory(side, arguments) for side in sides
    }  # first: a child inherits its parent's peak
    steps = {side: step_of(side, arguments) for side in sides}
    turns = [{side: cpu_seconds(step) for side, step in steps.items()} for _ in range(options.rounds + 1)]
    medians = {side: statistics.median(turn[side] for turn in turns[1:]) for side in sides}
    print(f"{options.size} x {options.size}, width {options.width}, batch {options.batch}, one thread")
    print("| order | CPU s per iteration | ratio | peak MiB |\n|---|---|---|---|")
    for side, seconds in medians.items():
        print(f"| {side} | {seconds:.2f} | {seconds / medians[sides[0]]:.2f} | {peaks[side]:.0f} |")


if __name__ == "__main__":
    main()
