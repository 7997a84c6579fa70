"""Figures that plotly.js draws in the reader's browser, to zoom into and to read values off."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from lit_gen.figures import LINEAR, Line

Drawing = dict[str, Any]
"""What plotly.js draws: its `data` and its `layout`, as JSON has them; `wide` asks for the whole width."""


def finite(drawing: Any) -> Any:
    """The drawing with None, which is a gap, where a number is infinite or NaN, which JSON does not have."""
    if isinstance(drawing, dict):
        return {key: finite(value) for key, value in drawing.items()}
    if isinstance(drawing, list | tuple):
        return [finite(value) for value in drawing]
    return None if isinstance(drawing, float) and not math.isfinite(drawing) else drawing


def curve_panel(title: str, lines: Sequence[Line], most: int = 1000) -> Drawing:
    """A panel of curves over the batches, whose values are read off by the mouse, with buttons for the scale
    of the y-axis; of each curve `most` points at most, its extremes among them."""
    data, low = [], math.inf
    for label, points, errors in lines:
        steps = _thinned(sorted(step for step, value in points.items() if math.isfinite(value)), points, most)
        values = [points[step] for step in steps]
        mode = "lines+markers" if len(steps) < 30 else "lines"
        data.append({"type": "scatter", "mode": mode, "name": html.escape(label), "x": steps, "y": values})
        if errors:
            error = [errors.get(step, 0.0) for step in steps]
            data[-1]["error_y"] = {"type": "data", "array": error, "thickness": 1, "width": 3}
        low = min(low, *values, math.inf)
    scales = ("linear", "log") if low <= 0 or title in LINEAR else ("log", "linear")
    buttons = [{"label": s, "method": "relayout", "args": [{"yaxis.type": s}]} for s in scales]
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
    layout = _layout(title, "batches", "", yaxis={"type": scales[0], "exponentformat": "power"})
    layout["updatemenus"] = [{"type": "buttons", "direction": "right", "buttons": buttons, **place}]
    return {"data": data, "layout": layout | {"showlegend": len(lines) > 1}}


def _thinned(steps: Sequence[int], points: Mapping[int, float], most: int) -> list[int]:
    """At most so many of the steps: of each of `most` / 2 stretches the lowest and the highest value."""
    if len(steps) <= most:
        return list(steps)
    size = math.ceil(len(steps) / (most // 2))
    stretches = (steps[i : i + size] for i in range(0, len(steps), size))
    ends = ({min(part, key=points.__getitem__), max(part, key=points.__getitem__)} for part in stretches)
    return [step for pair in ends for step in sorted(pair)]


def _layout(title: str, x: str, y: str, height: int = 320, **axes: dict[str, Any]) -> dict[str, Any]:
    """What the figures share. `axes`: more options of xaxis and yaxis."""
    return {
        "title": {"text": html.escape(title), "font": {"size": 14}, "x": 0.02},
        "xaxis": {"title": {"text": html.escape(x)}} | axes.get("xaxis", {}),
        "yaxis": {"title": {"text": html.escape(y)}, "automargin": True} | axes.get("yaxis", {}),
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 60, "b": 45},
        "hovermode": "closest",
    }


def parallel_coordinates(
    keys: Mapping[str, Sequence[Any]], objective: str, scores: Sequence[float], minimize: bool
) -> Drawing:
    """A line for each trial of a sweep across an axis for each key, and one for the objective, which colors
    it: dark is good. `keys`: key -> the values of the trials; axes of numbers over a wide range are
    logarithmic."""
    axes = [_axis(key, values) for key, values in keys.items()]
    axes.append(_axis(objective, scores))
    line = {"color": axes[-1]["values"], "colorscale": "Viridis", "reversescale": not minimize}
    layout = _layout("", "", "", height=420) | {"margin": {"l": 90, "r": 90, "t": 70, "b": 30}}
    return {"data": [{"type": "parcoords", "line": line, "dimensions": axes}], "layout": layout, "wide": True}


def _axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """A dimension of parallel coordinates."""
    label = html.escape(name)
    if not _numbers(values):
        kinds = sorted({str(v) for v in values})
        places = [kinds.index(str(v)) for v in values]
        return {"label": label, "values": places, "tickvals": [*range(len(kinds))], "ticktext": kinds}
    if not _wide(values):
        return {"label": label, "values": list(values)}
    low, high = math.log10(min(values)), math.log10(max(values))
    ticks = [low + (high - low) * k / 4 for k in range(5)]
    texts = [f"{10**tick:.3g}" for tick in ticks]
    return {"label": label, "values": [math.log10(v) for v in values], "tickvals": ticks, "ticktext": texts}


def _numbers(values: Sequence[Any]) -> bool:
    """Whether they have places on an axis: infinity has none, and is a category."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _wide(values: Sequence[Any]) -> bool:
    """Whether a logarithmic axis shows the numbers better."""
    return _numbers(values) and min(values) > 0 and max(values) > 20 * min(values)


def importance_bars(shares: Mapping[str, float], objective: str) -> Drawing:
    """The share of each key in the variance of the objective, the largest on top."""
    names = sorted(shares, key=shares.__getitem__)
    percents = [100 * shares[name] for name in names]
    bars = {"type": "bar", "orientation": "h", "x": percents, "y": [html.escape(name) for name in names]}
    layout = _layout(f"importance for {objective}", "% of its variance", "")
    return {"data": [bars], "layout": layout}


def sweep_slice(
    key: str, values: Sequence[Any], objective: str, scores: Sequence[float], trials: Sequence[str]
) -> Drawing:
    """The objective of the trials over one key."""
    x = list(values) if _numbers(values) else [html.escape(str(v)) for v in values]
    points = {"type": "scatter", "mode": "markers", "x": x, "y": list(scores), "text": list(trials)}
    points["hovertemplate"] = "trial %{text}<br>%{x}: %{y:.5g}<extra></extra>"
    across, up = ({"type": "log"} if _wide(v) else {} for v in (values, scores))
    return {"data": [points], "layout": _layout("", key, objective, xaxis=across, yaxis=up)}


def search_rewards(rewards: Mapping[str, Sequence[float]]) -> Drawing:
    """The rewards of policy searches by child model, with the best so far. `rewards`: search -> rewards."""
    data: list[dict[str, Any]] = []
    for k, (name, values) in enumerate(rewards.items()):
        line = {"x": [*range(1, len(values) + 1)], "legendgroup": name, "type": "scatter"}
        color = f"hsl({137 * k % 360}, 60%, 45%)"  # of any number of searches
        points = {"mode": "markers", "y": list(values), "marker": {"size": 4, "color": color}}
        best = {"mode": "lines", "y": [*accumulate(values, max)], "line": {"color": color, "shape": "hv"}}
        data.append(line | points | {"name": html.escape(name)})
        data.append(line | best | {"name": html.escape(f"{name}, best so far")})
    return {"data": data, "layout": _layout("", "child models", "reward", height=420), "wide": True}


def policy_table(sub_policies: Sequence[Sequence[tuple[str, float, float | None]]]) -> Drawing:
    """A policy as a table: a row a sub-policy, a column for each of its ops one after another, with the level
    of the op; the color is its probability."""
    steps = max(map(len, sub_policies))
    rows = [[*sub, *[("", None, None)] * (steps - len(sub))] for sub in sub_policies]
    table = {
        "type": "heatmap",
        "z": [[probability for _, probability, _ in row] for row in rows],
        "x": [f"op {k}" for k in range(1, steps + 1)],
        "text": [[op if level is None else f"{op}, {level:g}" for op, _, level in row] for row in rows],
        "texttemplate": "%{text}",
        "hovertemplate": "sub-policy %{y}, %{x}: %{text}<br>probability %{z}<extra></extra>",
        "colorscale": [[0, "#ffffff"], [1, "#6baed6"]],
        "zmin": 0,
        "zmax": 1,
        "colorbar": {"title": {"text": "probability"}},
    }
    down = {"autorange": "reversed", "dtick": 1}
    layout = _layout("", "", "sub-policy", height=120 + 26 * len(rows), yaxis=down)
    return {"data": [table], "layout": layout, "wide": steps > 2}
