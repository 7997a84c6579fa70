"""Curves of a run, for people who would rather look than read."""

from pathlib import Path
from typing import Any

from lit_gen.runs import history

__all__ = ["curves", "plain_ticks"]

LOSSES = ("train/loss", "val/loss", "train/generator/loss", "train/discriminator/loss")


def plain_ticks(axis: Any) -> None:
    """0.6 beside a logarithmic y-axis, where matplotlib writes 6 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
            return f"{x:g}"

    if axis.get_yscale() == "log":
        axis.yaxis.set_major_formatter(Plain())
        axis.yaxis.set_minor_formatter(Plain(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))


def curves(run: str | Path) -> Path | None:
    """Draws losses, Frechet distances, gradient norm and throughput into `curves.png` of the run folder.

    Returns its path, or None if the run has logged nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    numbers = history(run)
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
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3), constrained_layout=True, squeeze=False
    )
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            steps, values = zip(*sorted(numbers[name].items()), strict=True)
            axis.plot(
                steps, values, marker="o" if len(steps) < 20 else None, markersize=3, linewidth=1, label=name
            )
        signed = any(value <= 0 for name in names for value in numbers[name].values())
        linear = signed or title in ("images/s", "K-shot translation")
        axis.set(title=title, xlabel="batches", yscale="linear" if linear else "log")
        plain_ticks(axis)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    path = Path(run) / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
