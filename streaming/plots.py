"""The plots of a report, each as one inline SVG that takes its colours from the page, so that it follows light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from streaming.prequential import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from streaming.report import Attention, Coverage, Curve

# Stand-ins that matplotlib draws with and `_svg` turns into variables of the page's style.
_INK, _FAINT = "#010203", "#040506"
_LINES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05")
_VARIABLES = {_INK: "--ink", _FAINT: "--line"} | {line: f"--series-{place}" for place, line in enumerate(_LINES, 1)}
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v")

_STYLE: dict[Any, Any] = {  # the keys' type differs between versions of matplotlib
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and takes the page's font
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "text.parse_math": False,  # a dollar in a name is a dollar
}

_thousands = FuncFormatter(lambda value, _: f"{value:,.0f}")


def running_error(curves: Mapping[str, Curve], names: Mapping[str, str]) -> str:
    """MAE over the last events, against events so far, for each method. Empty without events."""
    if not any(curve.events for curve in curves.values()):
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(8.4, 3.7, "events so far", "MAE over the last events")
        for place, (name, curve) in enumerate(curves.items()):
            axes.plot(
                curve.events,
                curve.mae,
                color=_LINES[place],
                linestyle=_DASHES[place],
                linewidth=1.7,
                zorder=10 - place,
                label=names.get(name, name),
            )
        axes.xaxis.set_major_formatter(_thousands)
        axes.set_xlim(left=0)
        _legend_above(axes, len(curves))
        return _svg(figure, "running", "Running error of each method against events so far")


def error_by_earlier(bins: Mapping[str, Sequence[Bin]], names: Mapping[str, str]) -> str:
    """MAE against how many events the user had before, with bars of two standard errors each way. Empty without bins."""
    if not any(bins.values()):
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(8.4, 3.7, "earlier events of the user", "MAE")
        labels = {b.first: f"{b.first}" if b.first == b.last else f"{b.first}–{b.last}" for group in bins.values() for b in group}
        places = {first: place for place, first in enumerate(sorted(labels))}
        for place, (name, group) in enumerate(bins.items()):
            shift = (place - (len(bins) - 1) / 2) * 0.13
            axes.errorbar(
                [places[b.first] + shift for b in group],
                [b.mae for b in group],
                yerr=[2 * (b.mae_se or 0.0) for b in group],
                color=_LINES[place],
                marker=_MARKERS[place],
                markersize=5,
                linestyle=_DASHES[place],
                linewidth=1.2,
                elinewidth=1.2,
                capsize=2.5,
                zorder=10 - place,  # the first method, Coldstream, lies on top
                label=names.get(name, name),
            )
        axes.set_xticks(list(places.values()), [labels[first] for first in places])
        axes.grid(visible=False, axis="x")
        _legend_above(axes, len(bins))
        return _svg(figure, "earlier", "Mean absolute error of each method against the number of earlier events of the user")


def attention(series: Sequence[Attention]) -> str:
    """The spread of the memory's attention over users, and of its rows, against events. Empty without a series."""
    if not series:
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(8.4, 3.0, "events so far", "spread")
        events = [point.events for point in series]
        lines = (("attention over users", [p.spread_users for p in series]), ("rows of the memory", [p.spread_rows for p in series]))
        for place, (label, values) in enumerate(lines):
            axes.plot(
                events,
                values,
                color=_LINES[place],
                linestyle=_DASHES[place],
                linewidth=1.7,
                label=label,
                marker="o" if len(series) < 3 else "",
            )
        axes.xaxis.set_major_formatter(_thousands)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        _legend_above(axes, 2)
        return _svg(figure, "attention", "Spread of attention over users and of the memory's rows against events so far")


def stages(seconds: Mapping[str, float]) -> str:
    """Seconds of each stage as bars, longest first. Empty without stages."""
    if not seconds:
        return ""
    with mpl.rc_context(_STYLE):
        ordered = sorted(seconds.items(), key=lambda entry: entry[1])
        total = sum(seconds.values()) or 1.0
        figure, axes = _axes(8.4, 0.8 + 0.34 * len(ordered), "seconds", "")
        bars = axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=_LINES[0], height=0.62)
        axes.bar_label(bars, [f"{value:,.1f} s, {value / total:.0%}" for _, value in ordered], padding=5, fontsize=9, color=_INK)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max(seconds.values()) * 1.18 or 1.0)
        return _svg(figure, "stages", "Seconds spent in each stage of a step")


def calibration(points: Sequence[Coverage]) -> str:
    """Actual against nominal coverage of the scores' intervals. Empty without points."""
    if not points:
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(4.6, 4.2, "share that the interval should hold", "share of ratings in it")
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=_DASHES[1], label="perfect")
        axes.plot([p.nominal for p in points], [p.actual for p in points], color=_LINES[0], marker="o", markersize=4.5, label="Coldstream")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axis.set_minor_locator(NullLocator())
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.tick_params(pad=6)
        _legend_above(axes, 2)
        return _svg(figure, "calibration", "Actual against nominal coverage of the intervals around the scores")


def _axes(width: float, height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element with a title, its colours those of the page. ``name`` keeps its ids apart from other figures'."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib numbers groups alike in every figure (figure_1, axes_1); ids must be unique in a page and nothing refers to these.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # The page sets the width; the viewBox keeps the shape.
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-labelledby="title-{name}">', svg, count=1)
    return svg.replace(">", f'><title id="title-{name}">{title}</title>', 1)
