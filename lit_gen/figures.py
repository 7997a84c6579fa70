"""All figures: curves of runs, of policy searches, and of sweeps."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study

__all__ = ["Line", "curves", "importances", "panel_svg", "plain_ticks", "save", "search_curves", "slices"]

LOSSES = ("train/loss", "val/loss", "train/generator/loss", "train/discriminator/loss")
LINEAR = ("images/s", "images per second", "K-shot translation", "learning rate", "peak memory in GiB")

Line = tuple[str, Mapping[int, float], Mapping[int, float]]
"""A curve: its label, {batches: value}, and {batches: standard error}, which may be empty."""


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
    from matplotlib.figure import Figure

    panels = {
        "loss": [n for n in LOSSES if n in numbers],
        "Frechet distance": sorted(n for n in numbers if n.startswith(("fd_", "fid"))),
        "K-shot translation": sorted(n for n in numbers if n.startswith("k_shot/")),
        "gradient norm": sorted(n for n in numbers if n.startswith("train/") and n.endswith("grad_norm")),
        "images/s": [n for n in ("throughput/images_per_second",) if n in numbers],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        _panel(axis, title, [(name, numbers[name], {}) for name in names])
    return figure


def panel_svg(title: str, lines: Iterable[Line], legend: bool) -> str:
    """A panel of curves over the batches as an SVG element, the same for the same numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure, text = Figure(figsize=(5, 3.2), layout="constrained"), io.StringIO()
    _panel(figure.subplots(), title, lines, legend)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


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
    from itertools import accumulate

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
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
