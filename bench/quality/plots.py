"""Pictures of the frontier: each metric against density, and density and error head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import summary
from methods import METHODS

STYLES = {"reference": ":", "baseline": "--", "ablation": "-.", "variant": "-"}


def draw_all(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write PNGs into ``folder``; returns their paths. Without matplotlib nothing is drawn."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is missing: no plots (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    paths = []
    for length in summary.lengths(data):
        model = {
            "perplexity": "rise of perplexity",
            **{task: f"{task}: token accuracy lost" for task in data["settings"]["tasks"]},
        }
        panels = {
            title: summary.model_curves(data, length, metric) for metric, title in model.items()
        }
        paths += _draw_curves(panels, folder / f"model_{length}.png", f"{length} tokens")
        panels = {
            "attention mass missed": summary.head_curves(data, length, "recall"),
            "relative output error": summary.head_curves(data, length, "error"),
        }
        paths += _draw_curves(panels, folder / f"heads_{length}.png", f"{length} tokens")
        paths += _draw_times(data, length, folder / f"estimate_{length}.png")
        paths += _draw_layers(data, length, folder / f"layers_{length}.png")
    return paths


def _color(method: str) -> Any:
    from matplotlib import colormaps

    names = list(METHODS)
    return colormaps["tab20"](names.index(method) % 20 if method in names else 0)


def _style(method: str) -> str:
    return STYLES[METHODS[method].group] if method in METHODS else "-"


def _draw_curves(panels: dict[str, dict[str, summary.Curve]], path: Path, title: str) -> list[Path]:
    """One panel per metric, loss (logarithmic, floored) against density."""
    from matplotlib.figure import Figure

    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        return []
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4.2 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for method in summary.ordered(curves, list(METHODS)):
            densities, losses = zip(*curves[method], strict=True)
            # At or under the floor a loss is not told from none.
            floored = [max(loss, 1e-4) for loss in losses]
            axis.plot(
                densities,
                floored,
                _style(method),
                marker=".",
                color=_color(method),
                label=method,
            )
        axis.set_yscale("log")
        axis.set_xlabel("density (computed area)")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return [path]


def _draw_times(data: dict[str, Any], length: int, path: Path) -> list[Path]:
    """Density needed for +0.3 % perplexity against the time of estimation in PyTorch."""
    from matplotlib.figure import Figure

    times = summary.estimate_times(data, length)
    curves = summary.model_curves(data, length, "perplexity")
    points = {
        method: (times[method], needed)
        for method, curve in curves.items()
        if (needed := summary.density_needed(curve, 0.003)) is not None
    }
    if not points:
        return []
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for method, (milliseconds, needed) in points.items():
        axis.plot(milliseconds, needed, "o", color=_color(method))
        axis.annotate(
            method, (milliseconds, needed), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    axis.set_xscale("log")
    axis.set_xlabel("estimation in PyTorch, ms per attention call")
    axis.set_ylabel("density needed for perplexity +0.3 %")
    axis.set_title(f"{length} tokens, {data['settings']['device']}")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return [path]


def _draw_layers(data: dict[str, Any], length: int, path: Path) -> list[Path]:
    """Density and output error of every layer and head, at each method's main setting."""
    from matplotlib.figure import Figure

    names = [key.split("/")[1] for key in data["heads"] if key.startswith(f"{length}/")]
    # The first few of the run's own order, without dense.
    names = [name for name in names if name in METHODS and name != "dense"][:6]
    if not names:
        return []
    figure = Figure(figsize=(2.4 * len(names), 5.2), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        rows = data["heads"][f"{length}/{name}"]
        rows = [row for row in rows if row["knob"] == METHODS[name].main]
        for axis, metric, top in zip(
            axes[:, column], ("density", "error"), (1.0, 0.3), strict=True
        ):
            image = axis.imshow([row[metric] for row in rows], vmin=0, vmax=top, aspect="auto")
            axis.set_title(f"{name}\n{metric}" if metric == "density" else metric, fontsize=8)
            axis.set_xlabel("head", fontsize=7)
            axis.set_ylabel("layer", fontsize=7)
        figure.colorbar(image, ax=axes[1, column], shrink=0.7)
    figure.suptitle(f"{length} tokens, one setting per method")
    figure.savefig(path, dpi=110)
    return [path]
