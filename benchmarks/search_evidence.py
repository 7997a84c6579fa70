"""Does the search find an effect where there is one, and none where there is none? The tables of
docs/augment.md, measured on one thread:

    python benchmarks/search_evidence.py synthetic    # PPO against random search on a synthetic reward
    python benchmarks/search_evidence.py invariance   # upright digits, rotated tests; 6 against 9: control
    python benchmarks/search_evidence.py digits       # no policy, RandAugment, random search at equal budgets
    python benchmarks/search_evidence.py generative   # six images of a symmetric distribution, a score model
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits

from lit_gen import rng
from lit_gen.augment import warps
from lit_gen.augment.policy import Augmentation, Policy
from lit_gen.metrics import pixel_means
from lit_gen.search.density import density_folds
from lit_gen.search.generative import WAYS, ConditionalSpace, GenerativeReward
from lit_gen.search.loop import Result, run
from lit_gen.search.methods import TPE, Grid, Random
from lit_gen.search.ppo import PPO
from lit_gen.search.rewards import ClassifierReward, Labelled, SyntheticReward, accuracy
from lit_gen.search.space import (
    PolicySpace,
    RandAugmentSpace,
    classification_space,
    detection_space,
    merge,
)

__all__ = ["digit_splits", "digits_table", "invariance_table", "synthetic_table"]

CHILD = {"epochs": 5, "width": 8, "batch_size": 32}
# Few images and many passes over them: with fewer passes these child models underfit and any policy harms.
FEW, FEW_CHILD = (100, 400, 700), {"epochs": 40, "width": 8, "batch_size": 32}
# SamplePairing and Cutout aside: at 16 pixels and with labels that are shapes they only add noise to a small
# search.
SMALL_OPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Contrast", "Sharpness")
SMALL_OPS += ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")


def small_space() -> PolicySpace:
    """Two sub-policies of one of 13 ops, on a coarse grid: what some dozens of child models can explore."""
    return classification_space(
        ops=SMALL_OPS,
        probabilities=(0.4, 0.7, 1.0),
        levels=(1, 3, 5, 7, 9),
        num_sub_policies=2,
        num_ops=1,
        options={"fill": 0},
    )


def digit_splits(
    seed: int, sizes: Sequence[int] = (300, 400, 700), only: Sequence[int] = range(10)
) -> list[Labelled]:
    """Disjoint parts of scikit-learn's digits, each enlarged to 16 x 16 uint8, labels counted from 0."""
    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).to(torch.uint8)[:, None]
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.tensor([list(only).index(y) if y in only else -1 for y in data.target.tolist()])
    order = torch.randperm(len(labels), generator=rng.keyed_generator(seed, "split"))
    order = order[labels[order] >= 0]
    return [Labelled(images[rows], labels[rows]) for rows in order[: sum(sizes)].split(list(sizes))]


def rotated(data: Labelled, seed: int, degrees: float = 40) -> Labelled:
    """Each image turned by its own angle in +-`degrees`."""
    angles = (2 * torch.rand(len(data), generator=rng.keyed_generator(seed, "angles")) - 1) * degrees
    size = data.images.shape[-2:]
    return Labelled(warps.warp(data.images, warps.rotation(angles.tolist(), *size), 0), data.labels)


def synthetic_table(seeds: Sequence[int]) -> None:
    space = detection_space()
    print("seed | PPO, mean of the last 100 | best random of 2,000 | random, mean")
    for seed in seeds:
        reward = SyntheticReward(space, seed)
        exact = {}
        for method in (PPO(space, seed), Random(space, seed)):
            trials = run(space, reward, method, 2000).trials
            exact[type(method)] = [reward.exact(space.decode(t.choices)) for t in trials]
        ppo, random = exact[PPO], exact[Random]
        print(
            f"{seed} | {sum(ppo[-100:]) / 100:.3f} | {max(random):.3f} | {sum(random) / 2000:.3f}", flush=True
        )


def mean_accuracy(reward: ClassifierReward, augmentation: Augmentation | None, test: Labelled) -> float:
    """The mean over three child models of seeds that the search has not seen."""
    return statistics.mean(accuracy(reward.child(augmentation, 100 + k), test) for k in range(3))


def top_share(result: Result, space: PolicySpace, op: str, k: int = 10) -> float:
    """The share of an op in the k best policies; chance is 1 / len(ops)."""
    best = sorted(result.trials, key=lambda t: -t.reward)[:k]
    return space.op_frequencies([t.choices for t in best])[op]


def invariance_table(seeds: Sequence[int], budget: int) -> None:
    space = small_space()
    chance = 1 / len(space.ops)
    print(f"data | seed | Rotate in the 10 best (chance {chance:.3f}) | test, none | test, searched")
    for name, turn in (
        ("ten digits, validation and test rotated", True),
        ("6 against 9, all upright", False),
    ):
        for seed in seeds:
            splits = digit_splits(seed) if turn else digit_splits(seed, (60, 120, 170), (6, 9))
            train, validation, test = splits
            if turn:
                validation, test = rotated(validation, seed), rotated(test, seed + 1000)
            reward = ClassifierReward(train, validation, 10 if turn else 2, **CHILD)
            result = run(space, reward, TPE(space, seed), budget)
            found = merge(result.top(3))
            scores = [mean_accuracy(reward, a, test) for a in (None, found)]
            share = top_share(result, space, "Rotate")
            print(f"{name} | {seed} | {share:.3f} | {scores[0]:.3f} | {scores[1]:.3f}", flush=True)


def digits_table(seeds: Sequence[int], budget: int) -> None:
    """Every method trains `budget` child models, and what it found is the merged three best policies; density
    matching trains three nets and tries `budget` policies on each, the best of each merged."""
    space = small_space()
    grid = RandAugmentSpace((1, 2), _spread(1, 30, budget // 2), options={"fill": 0})
    rows: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in seeds:
        train, validation, test = digit_splits(seed, FEW)
        reward = ClassifierReward(train, validation, 10, **FEW_CHILD)
        methods = {
            "TPE": (space, TPE(space, seed)),
            "PPO": (
                space,
                PPO(space, seed, learning_rate=3.5e-3, batch=6, entropy=1e-5, baseline=0.95),
            ),
            "best of random": (space, Random(space, seed)),
            "RandAugment, best of its grid": (grid, Grid(grid)),
        }
        rows.setdefault("none", []).append(mean_accuracy(reward, None, test))
        for name, (choices, method) in methods.items():
            start = time.process_time()
            top = run(choices, reward, method, budget).top(3)
            seconds.setdefault(name, []).append(time.process_time() - start)
            found = merge(top) if isinstance(top[0], Policy) else top[0]
            rows.setdefault(name, []).append(mean_accuracy(reward, found, test))
        start = time.process_time()
        folds = density_folds(_joined(train, validation), 10, folds=3, seed=seed, **FEW_CHILD)
        methods = [TPE(space, rng.key(seed, "fold", k)) for k in range(len(folds))]
        results = [run(space, *fold, budget) for fold in zip(folds, methods, strict=True)]
        found = merge([result.best for result in results])
        seconds.setdefault("density matching", []).append(time.process_time() - start)
        rows.setdefault("density matching", []).append(mean_accuracy(reward, found, test))
        print({name: round(values[-1], 4) for name, values in rows.items()}, flush=True)
    print("method | test accuracy, mean +- s.d. over seeds | against none | seeds better | CPU s per search")
    for name, values in rows.items():
        gains = [v - n for v, n in zip(values, rows["none"], strict=True)]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        cost = f"{statistics.mean(seconds[name]):.1f}" if name in seconds else "-"
        print(
            f"{name} | {mean:.4f} +- {deviation:.4f} | {statistics.mean(gains):+.4f} +- "
            f"{statistics.stdev(gains):.4f} | {sum(g > 0 for g in gains)} of {len(gains)} | {cost}"
        )


def squares(n: int, seed: int) -> Labelled:
    """A white square anywhere in the upper half of a black image: left and right may change places, top and
    bottom may not."""
    g = rng.keyed_generator(seed, "squares")
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for image in images:
        y, x = (int(torch.randint(high, (), generator=g)) for high in (2, 6))
        image[:, y : y + 3, x : x + 3] = 255
    return Labelled(images, torch.zeros(n, dtype=torch.int64))


def generative_table(seeds: Sequence[int]) -> None:
    """Of each of the nine augmentations the Fréchet distance to images of the whole distribution, by seed."""
    space = ConditionalSpace(transforms=("xflip", "yflip"), probabilities=(1.0,))
    options = {"steps": 250, "batch_size": 32, "num_steps": 8, "extractor": pixel_means(1, 4)}
    distances: dict[tuple[int, ...], list[float]] = {}
    for seed in seeds:
        reward = GenerativeReward(squares(6, seed), squares(300, 1000 + seed), 1, seeds=(seed,), **options)
        result = run(space, reward, Grid(space), budget=9)
        for trial in result.trials:
            distances.setdefault(trial.choices[1:], []).append(-trial.reward)
        print(
            f"seed {seed}: best {result.best.active}, untold {result.best.untold}; {result.cost}", flush=True
        )
    print("left-right | upside down | mean | by seed")
    for ways, values in distances.items():
        names = " | ".join(WAYS[way] for way in ways)
        print(f"{names} | {statistics.mean(values):.2f} | {' '.join(f'{v:.2f}' for v in values)}")


def _spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` different whole numbers from `low` to `high`, evenly, or all there are."""
    return tuple(dict.fromkeys(torch.linspace(low, high, count).round().int().tolist()))


def _joined(a: Labelled, b: Labelled) -> Labelled:
    return Labelled(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("synthetic", "invariance", "digits", "generative"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=60, help="child models per search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.seeds)
    if arguments.what == "synthetic":
        synthetic_table(seeds)
    elif arguments.what == "invariance":
        invariance_table(seeds, arguments.budget)
    elif arguments.what == "generative":
        generative_table(seeds)
    else:
        digits_table(seeds, arguments.budget)


if __name__ == "__main__":
    main()
