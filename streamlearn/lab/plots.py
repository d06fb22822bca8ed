"""Draws the curves of an evaluation. Needs matplotlib (extra `lab`), imported only here and only when used.

Colours of Okabe and Ito (2008), distinguishable for colour-blind readers; line styles and markers differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamlearn.errors import ConfigError
from streamlearn.lab.curves import CurvePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_ACCURACIES = (
    # field of CurvePoint, legend, colour, line style, marker
    ("oracle", "oracle: last {window:,} samples", _BLUE, "-", "o"),
    ("observed", "observed: last {window:,} labels", _ORANGE, "-", "s"),
    ("observed_since", "observed: labels since the last point", _ORANGE, "", "o"),
    ("at_label_teacher", "teacher when the label comes", _GREEN, "-", "^"),
    ("at_label_twin", "label-only twin when the label comes", _PURPLE, "-", "v"),
    ("majority", "majority class", _GREY, "--", ""),
    ("no_change", "no change", _GREY, ":", ""),
)
_MOST_MARKERS = 40
_DPI = 150


def check_can_plot() -> None:
    """Check that matplotlib is installed.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415
    except ImportError:
        msg = "plot: matplotlib is not installed; pip install 'streamlearn[lab]', or use --no-plot"
        raise ConfigError(msg) from None


def draw(
    curves: Sequence[CurvePoint],
    *,
    title: str,
    subtitle: str,
    window: int,
    test_accuracy: float | None,
    drifts_at: Sequence[int],
) -> bytes:
    """Draw a PNG: the accuracies over the stream and, if there is a twin, `ssl_gain`.

    Args:
        curves: at least one point.
        title: in bold, at the top.
        subtitle: below the title, smaller.
        window: samples, or labels, of a windowed accuracy.
        test_accuracy: of the teacher, on held-out samples at the end.
        drifts_at: numbers of the samples at which a drift starts or ends.
    """
    # Not pyplot, which needs a window system and keeps figures in a global list.
    from matplotlib.figure import Figure  # noqa: PLC0415

    has_gain = any(point.ssl_gain is not None for point in curves)
    figure = Figure(figsize=(11.0, 6.5 if has_gain else 5.0), layout="constrained")
    if has_gain:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    else:
        above, below = figure.subplots(), None
    above.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    small = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 9, "color": "#444444"}
    above.annotate(subtitle, (0.0, 1.0), xytext=(0.0, 8.0), **small)
    _draw_accuracies(above, curves, window, test_accuracy)
    if below is not None:
        _draw_gain(below, curves)
    for axes in (above, below) if below is not None else (above,):
        _finish(axes, drifts_at, up_to=curves[-1].samples)
    (below or above).set_xlabel("samples predicted")
    return _as_png(figure)


def _draw_accuracies(axes: Axes, curves: Sequence[CurvePoint], window: int, test_accuracy: float | None) -> None:
    every = max(1, len(curves) // _MOST_MARKERS)
    for name, legend, colour, style, marker in _ACCURACIES:
        at, values = _line(curves, name)
        if at:
            axes.plot(
                at,
                values,
                color=colour,
                linestyle=style,
                linewidth=1.8 if marker else 1.4,
                marker=marker or None,
                markersize=4 if style else 5,
                markevery=every if style else 1,
                markerfacecolor=colour if style else "none",
                label=legend.format(window=window),
                zorder=3 if marker else 2,
            )
    if test_accuracy is not None:
        legend = f"held-out test at the end: {test_accuracy:.3f}"
        end = float(curves[-1].samples)
        axes.plot([end], [test_accuracy], "*", color="black", markersize=12, label=legend, zorder=4, clip_on=False)
    axes.set_ylim(-0.02, 1.02)  # room for whole markers at 0 and 1
    axes.set_ylabel("accuracy")


def _draw_gain(axes: Axes, curves: Sequence[CurvePoint]) -> None:
    known = [point for point in curves if point.ssl_gain is not None and point.ssl_gain_low is not None]
    at, gain, low, high = (
        [float(getattr(point, name) or 0.0) for point in known]
        for name in ("samples", "ssl_gain", "ssl_gain_low", "ssl_gain_high")
    )
    axes.axhline(0.0, color=_GREY, linestyle="--", linewidth=1.2)
    axes.fill_between(at, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="95 % interval")
    axes.plot(at, gain, color=_BLUE, linewidth=1.8, marker=".", label="teacher minus twin")
    # The wide intervals of the first labels must not set the scale.
    later = slice(len(known) // 2, None)
    reach = 1.15 * max((abs(bound) for bound in (*low[later], *high[later])), default=0.0)
    axes.set_ylim(-max(reach, 0.02), max(reach, 0.02))
    axes.set_ylabel("ssl_gain")


def _line(curves: Sequence[CurvePoint], name: str) -> tuple[list[float], list[float]]:
    """Samples and values of the points where a score is defined."""
    defined = [point for point in curves if getattr(point, name) is not None]
    return [float(point.samples) for point in defined], [float(getattr(point, name)) for point in defined]


def _finish(axes: Axes, drifts_at: Sequence[int], *, up_to: int) -> None:
    legend = "drift"
    for at in drifts_at:
        if 0 < at <= up_to:
            axes.axvline(at, color="black", linestyle="-.", linewidth=1.0, label=legend)
            legend = "_"  # a single legend entry for all drifts
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, borderaxespad=0.0)


def _as_png(figure: Figure) -> bytes:
    written = io.BytesIO()
    # Without the version of matplotlib, so that the same curves give the same bytes.
    figure.savefig(written, format="png", dpi=_DPI, metadata={"Software": None})
    return written.getvalue()
