"""All figures: curves of runs, of policy searches, of sweeps, and of translators."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from optuna import Study


LOSSES = ("train/loss", "val/loss", "train/generator/loss", "train/discriminator/loss")
LINEAR = ("images/s", "images per second", "K-shot translation", "learning rate", "peak memory in GiB")

Line = tuple[str, Mapping[int, float], Mapping[int, float]]
"""A curve: its label, {batches: value}, and {batches: standard error}, which may be empty."""


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", "np.ndarray"]:
    """An empty figure of a size in inches, and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def plain_ticks(axis: Any) -> None:
    """0.6 beside a logarithmic y-axis, where matplotlib writes 6 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
            return f"{x:g}"

    if axis.get_yscale() == "log":
        axis.yaxis.set_major_formatter(Plain())
        axis.yaxis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))


def save(figure: "Figure", path: Path) -> Path:
    """Writes a PNG file."""
    figure.savefig(path, dpi=120)
    return path


def curves(numbers: Mapping[str, Mapping[int, float]]) -> "Figure | None":
    """Losses, Frechet distances, gradient norm, and throughput of a run; None if it has logged nothing.

    `numbers`: name -> {batches: value}.
    """
    panels = {
        "loss": [n for n in LOSSES if n in numbers],
        "Fréchet distance": sorted(n for n in numbers if n.startswith(("fd_", "fid"))),
        "K-shot translation": sorted(n for n in numbers if n.startswith("k_shot/")),
        "gradient norm": sorted(n for n in numbers if n.startswith("train/") and n.endswith("grad_norm")),
        "images/s": [n for n in ("throughput/images_per_second",) if n in numbers],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    figure, axes = _figure(4 * len(panels), 3, columns=len(panels))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        _panel(axis, title, [(name, numbers[name], {}) for name in names])
    return figure


def _panel(axis: Any, title: str, lines: Iterable[Line], legend: bool = True) -> None:
    """Positive values on a logarithmic axis, but for what is told by its distance from 0."""
    low = float("inf")
    for label, points, errors in lines:
        steps, values = zip(*sorted(points.items()), strict=True)
        error = [errors.get(step, 0.0) for step in steps] if errors else None
        marker = "o" if len(steps) < 30 else None
        axis.errorbar(
            steps, values, error, capsize=2, label=label, linewidth=1.2, marker=marker, markersize=3
        )
        low = min(low, *values)
    scale = "linear" if low <= 0 or title in LINEAR else "log"
    axis.set(title=title, xlabel="batches", yscale=scale)
    plain_ticks(axis)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=7)


def search_curves(
    rewards: Mapping[str, Sequence[Sequence[float]]], shares: Mapping[str, Mapping[int, float]], chance: float
) -> "Figure":
    """Rewards by child model (name -> the rewards of each of its searches) with the best so far, and which
    ops a search chose as it went on (op -> {child models: its fraction}), if it has ops."""
    figure, (left, right) = _figure(10, 3.6, columns=2)
    for color, (name, searches) in zip(("C0", "C7"), rewards.items(), strict=False):
        for part, values in enumerate(searches):
            at, best = range(1, len(values) + 1), list(accumulate(values, max))
            left.plot(at, values, ".", color=color, markersize=2, alpha=0.4)
            left.plot(at, best, color=color, label=None if part else f"{name}, best")
    left.set(xlabel="child models", ylabel="reward")
    for op, points in shares.items():
        right.plot(*zip(*points.items(), strict=True), label=op)
    right.axhline(chance, color="C7", linestyle=":", label="chance")
    right.set(xlabel="child models", ylabel="fraction of the ops chosen")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    if not shares:
        right.remove()
    return figure


def slices(study: "Study", objective: str) -> "Figure":
    """The objective of a sweep's trials against each searched key."""
    return _of_optuna("plot_slice", study, objective)


def importances(study: "Study", objective: str, **options: Any) -> "Figure":
    """The share of each searched key in the variance of the objective. `options`: the evaluator."""
    return _of_optuna("plot_param_importances", study, objective, **options)


def _of_optuna(name: str, study: "Study", objective: str, **options: Any) -> "Figure":
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as drawings

    with matplotlib.rc_context():  # Optuna changes the style
        getattr(drawings, name)(study, target_name=objective, **options)
    figure = plt.gcf()
    plt.close(figure)
    return figure


def distance_curves(histories: Mapping[str, Mapping[str, Mapping[int, float]]]) -> "Figure | None":
    """The Frechet distances that runs logged, a panel for each name and a curve for each run, with error bars
    where they were logged; None if no run logged any twice.

    `histories`: run -> {name: {batches: value}}, with standard errors as `se/<name>`.
    """
    logged = {key for h in histories.values() for key in h if key.startswith(("fd_", "fid"))}
    panels = sorted(key for key in logged if any(len(h.get(key, ())) > 1 for h in histories.values()))
    if not panels:
        return None
    figure, axes = _figure(1 + 5 * len(panels), 4, columns=len(panels))
    for axis, key in zip(axes, panels, strict=True):
        _panel(axis, key, [(run, h[key], h.get(f"se/{key}", {})) for run, h in histories.items() if key in h])
    return figure


def augmentation_arms(
    by_shots: Mapping[str, Mapping[str, Any]], made: Mapping[str, Mapping[str, Any]]
) -> "Figure":
    """The comparison of augmentations: each arm's difference from none, paired over the seeds, by shots;
    accuracy over shots, if there are several; and the difference over the number of made images a class,
    where images were made for all shots. Error bars are standard errors. See
    `lit_gen.comparison.results.summarize` for the arguments.
    """
    panels = ["middle"] * (len(by_shots) > 1) + ["right"] * any(made.values())
    figure, (left, *others) = _figure(6 + 4.5 * len(panels), 5, columns=1 + len(panels))
    axes = dict(zip(panels, others, strict=True))
    arms = list(dict.fromkeys(arm for row in by_shots.values() for arm in row))
    for number, (shots, row) in enumerate(by_shots.items()):
        rows = [
            (len(arms) - i - 0.15 * number, row[arm]["minus"].get("none"))
            for i, arm in enumerate(arms)
            if arm in row
        ]
        at, found = zip(*[(y, f) for y, f in rows if f] or [(0, {"mean": 0, "se": 0})], strict=True)
        means, errors = ([100 * (f[key] or 0) for f in found] for key in ("mean", "se"))
        left.errorbar(means, at, xerr=errors, fmt="o", markersize=4, capsize=2, label=f"{shots} a class")
    left.axvline(0, color="gray", linewidth=1)
    left.set(yticks=range(len(arms), 0, -1), yticklabels=arms, xlabel="points of accuracy above none")
    for number, arm in enumerate(arms):
        style = {"color": f"C{number % 10}", "marker": "osv^"[number // 10 % 4], "label": arm}
        points = {int(n): row[arm]["accuracy"] for n, row in by_shots.items() if arm in row}
        if "middle" in axes:
            _percents(axes["middle"], points, **style)
        if curve := made.get(arm):
            nothing = {0: {"mean": 0.0, "se": 0.0}}
            _percents(axes["right"], nothing | {int(n): v for n, v in curve.items()}, **style)
    if "middle" in axes:
        shots = [int(n) for n in by_shots]
        axes["middle"].set(xlabel="labelled images a class", ylabel="accuracy in %", xticks=shots)
    if "right" in axes:
        axes["right"].set(xlabel="made images a class", ylabel="points of accuracy above none, all shots")
    for axis in (left, *others):
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    if panels:
        handles = axes[panels[0]].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", fontsize=7)
    return figure


def _percents(axis: Any, points: Mapping[int, Mapping[str, Any]], **style: Any) -> None:
    at = sorted(points)
    means, errors = ([100 * (points[n][key] or 0) for n in at] for key in ("mean", "se"))
    axis.errorbar(at, means, errors, capsize=2, markersize=4, linewidth=1.2, **style)


def translation_sweep(panels: Mapping[str, Mapping[str, float]], ks: Sequence[int]) -> "Figure":
    """Metrics of a translator over K, the number of class images, with the baselines as lines.

    `panels`: title -> {"K = <k>" for each of `ks`, "copying" and "pasting": value}.
    """
    columns = -(-len(panels) // 2)
    figure, axes = _figure(3 * columns, 5, 2, columns)
    for spare in axes[len(panels) :]:
        spare.remove()
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        axis.plot(ks, [values[f"K = {k}"] for k in ks], marker="o", markersize=3, label="FUNIT")
        for baseline, style in (("copying", ":"), ("pasting", "--")):
            axis.axhline(values[baseline], color="gray", linestyle=style, linewidth=1, label=baseline)
        axis.set(title=title, xlabel="K", xticks=ks)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def class_codes(places: Mapping[str, "np.ndarray"]) -> "Figure":
    """The places (n, 2) of the codes of single images, by class."""
    figure, (axis,) = _figure(9, 6)
    for c, (name, points) in enumerate(places.items()):
        axis.scatter(*points.T, s=10, marker="osv^"[c // 10 % 4], color=f"C{c % 10}", label=name)
    axis.set(xticks=[], yticks=[], title="class codes of single images (t-SNE)")
    figure.legend(loc="outside right upper", fontsize=6)
    return figure


def restoration_curve(arms: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """How often the piece that was cut out of a word is recognized in what a listener made of it, against the
    level of the noise in its place; completable words, error bars over words.

    `arms`: name -> measure -> group -> {"mean", "se_words"}; see `lit_gen.hearing.study.summarized`.
    """
    figure, (axis,) = _figure(7, 4.5)
    curves: dict[str, dict[float, Any]] = {}
    for name, row in arms.items():
        kind, _, listener = name.partition(", ")
        if (found := row["piece"]["completable"]) and "dB" in kind:
            noise, level = kind.removesuffix(" dB").rsplit(" ", 1)
            curves.setdefault(f"{noise} noise, {listener}", {})[float(level)] = found
    for label, points in curves.items():
        at = sorted(points)
        means, errors = ([100 * (points[x][key] or 0) for x in at] for key in ("mean", "se_words"))
        style = "-" if label.endswith(("masking", "matched")) else ":"
        axis.errorbar(at, means, errors, label=label, linestyle=style, marker="o", capsize=3)
    for name, color in (("silence, masking", "black"), ("told", "gray"), ("nearest", "tan")):
        if name in arms and (found := arms[name]["piece"]["completable"]):
            axis.axhline(100 * found["mean"], color=color, linestyle="--", linewidth=1, label=name)
    axis.set(
        xlabel="noise in the gap, dB beside the word", ylabel="missing piece recognized, %", ylim=(-3, 103)
    )
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7)
    return figure


def restoration_sheet(rows: Mapping[str, "np.ndarray"], columns: Sequence[str]) -> "Figure":
    """Spectrograms, a row a word: word -> (len(columns), height, width) in [-1, 1]."""
    figure, axes = _figure(0.85 * len(columns) + 0.9, 0.85 * len(rows) + 0.35, len(rows), len(columns))
    for i, (word, pictures) in enumerate(rows.items()):
        for j, picture in enumerate(pictures):
            axis = axes[i * len(columns) + j]
            axis.imshow(picture, cmap="magma", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(columns[j], fontsize=7)
            if j == 0:
                axis.set_ylabel(word, fontsize=7)
    return figure
