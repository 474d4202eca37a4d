"""How all pictures here are made.

The same data give the same bytes: no pyplot, no dates, no settings of the user's. Colours are Okabe and
Ito's, which every kind of colour vision can distinguish; markers repeat them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"
CROSS: dict[str, Any] = {"marker": "x", "color": "black", "markersize": 9, "markeredgewidth": 1.1}  # an INVALID timing
SIZES = {1: (6.4, 4.6), 2: (10.4, 4.2)}  # inches of a row of so many panels
WIDEST = (11.4, 4.0)
LEGEND_LETTERS = 16  # to an inch, in the small print of a legend
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.dpi": 150,
}


def handle(**look: object) -> Line2D:
    """What a legend shows of a marker."""
    from matplotlib.lines import Line2D

    drawn: dict[str, Any] = {"linestyle": "none", **look}
    return Line2D([], [], **drawn)


def legend_columns(labels: Iterable[str], most: int, *, panels: int) -> int:
    """How many columns of labels find room below so many panels, side by side: long names need more of it."""
    room = LEGEND_LETTERS * SIZES.get(panels, WIDEST)[0]
    return max(1, min(most, int(room // (5 + max(map(len, labels), default=0)))))


def png(draw: Callable[[Figure], None], *, columns: int = 1, rows: int = 1, row_height: float | None = None) -> bytes:
    """A PNG of what ``draw`` puts on a figure with room for so many panels; no date and no version in it.

    ``row_height`` in inches is for panels that are flatter than usual.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # What rcdefaults does, without reading every style that is shipped. The backend alone is not set back after it.
        defaults: dict[Any, Any] = {
            name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"
        }
        matplotlib.rcParams.update(defaults)
        matplotlib.rcParams.update(STYLE)
        width, height = SIZES.get(columns, WIDEST)
        figure = Figure(figsize=(width, (row_height or height) * rows), layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)
        draw(figure)
        # Places are found once: with a layout engine left, savefig draws all for it and throws that away.
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})  # savefig would draw it twice
    return buffer.getvalue()
