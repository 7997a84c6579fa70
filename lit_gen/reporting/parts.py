"""What sections are made of: curves, pictures, and numbers."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from lit_gen.reporting.drawings import Drawing, curve_panel

Section = dict[str, Any]
"""What page.html.j2 shows below a title: text, command, table with columns, plots, pictures, details."""

Histories = dict[str, dict[str, dict[int, float]]]
"""Run -> name -> {batches: value}."""

PANELS = {
    "loss": ("train/loss", "val/loss"),
    "loss by noise level": tuple(f"train/loss_noise_q{i}" for i in range(1, 5)),
    "gradient norm": ("train/grad_norm",),
    "learning rate": ("train/lr",),
    "images per second": ("throughput/images_per_second",),
    "peak memory in GiB": ("memory/peak_gib",),
}
MOST_POINTS = 50_000  # of all curves of a panel: what a browser draws at once


def number(value: Any) -> str:
    """As a table shows it: floats with five digits, integers with commas, "" for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def curves(histories: Histories) -> list[Drawing]:
    """A panel for each kind of number; with several runs a curve for each of them."""
    logged = {name for history in histories.values() for name in history}
    distances = sorted(n for n in logged if n.startswith(("fd_", "fid", "kd_", "kid")))
    panels = {
        name: (name,) for name in distances if any(len(h.get(name, ())) > 1 for h in histories.values())
    }
    panels |= {title: tuple(n for n in names if n in logged) for title, names in PANELS.items()}
    known = {name for names in panels.values() for name in names}
    others = sorted(n for n in logged - known if n.startswith(("train/", "val/", "samples/", "k_shot/")))
    panels |= {name: (name,) for name in others}
    drawings = []
    for title, names in panels.items():
        lines = [
            (
                f"{run} {name}" if run and len(names) > 1 else run or name,
                history[name],
                history.get(f"se/{name}", {}),
            )
            for run, history in histories.items()
            for name in names
            if name in history
        ]
        if lines:
            drawings.append(curve_panel(title, lines, max(100, MOST_POINTS // len(lines))))
    return drawings


def picture(path: Path, caption: str = "") -> dict[str, str] | None:
    """An image of the page; None if there is no such file."""
    if not path.is_file():
        return None
    return _embedded(path.read_bytes(), caption or path.stem)


def drawn(pixels: Tensor, caption: str) -> dict[str, str]:
    """An image of the page from uint8 (3, H, W)."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "png")
    return _embedded(file.getvalue(), caption)


def _embedded(data: bytes, caption: str) -> dict[str, str]:
    return {"source": f"data:image/png;base64,{base64.b64encode(data).decode()}", "caption": caption}


def sequence(paths: Sequence[Path], most: int) -> list[dict[str, str]]:
    """At most so many of the pictures `<kind>_<batches>.png`, evenly spread, the last among them."""
    chosen = np.unique(np.linspace(len(paths) - 1, 0, min(most, len(paths))).round().astype(int))
    shown = []
    for path in (paths[i] for i in chosen):
        kind, _, batches = path.stem.rpartition("_")
        if image := picture(path, f"{kind}, batch {int(batches) if batches.isdigit() else batches}"):
            shown.append(image)
    return shown


def frames(path: Path, columns: int, rows: int) -> list[dict[str, str]]:
    """The columns of a picture that `lit_gen.images.grid` made, one after another, each with its rows side by
    side: a trajectory as something to go through. `columns` and `rows` are how many there are at most; the
    whole picture if there are not several.
    """
    with PIL.Image.open(path) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    down, across = _cells(pixels, rows), _cells(pixels.mT, columns)
    h, w = ((pixels.shape[1] - 1) // down, (pixels.shape[2] - 1) // across)
    cells = pixels[:, 1:, 1:].reshape(3, down, h, across, w).permute(3, 0, 2, 1, 4)
    kind = path.stem.rpartition("_")[0]
    return [drawn(c.flatten(2), f"{kind}, frame {k} of {across}") for k, c in enumerate(cells, 1)]


def _cells(pixels: Tensor, most: int) -> int:
    """By how many cells of a grid, divided by lines of 32, the height of uint8 (3, H, W) is filled."""
    length = pixels.shape[1] - 1
    fits = (
        n for n in range(most, 1, -1) if length % n == 0 and bool((pixels[:, :: length // n] == 32).all())
    )
    return next(fits, 1)
