"""Pictures of results, with plotly: interactive in a notebook, one self-contained HTML file, or an image.

plotly and kaleido come with the extra `[plot]`. An image is drawn by Chrome or Chromium, which kaleido finds on PATH or
in BROWSER_PATH; HTML needs neither. kaleido before 1.0 brought a Chromium of its own, from 2021: the plotly of today
takes it no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.whole import whole

DIVERGING, RISING = "RdBu", "Blues"
IMAGES = (".png", ".svg", ".pdf")
SCALE = 2
"""Pixels of an image for each of the figure's own."""
CELL, MARGIN = 30, 150
WIDEST, TALLEST = 3000, 1550
"""Pixels of a figure: beyond some 16,000 of an image browsers draw none, and nobody looks at one."""
LETTERS, LINE = 46, 14
"""Pixels that a word in a cell needs at least, across and down."""
TICK = 18
"""Pixels between two names along an axis at least."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
GAP_FROM = 12
"""Pixels of a cell: smaller ones have no gap between them."""
MOST_NAMED = 30
"""Lines that a legend names."""
SIGNS = {".png": (b"\x89PNG", b"IEND\xaeB`\x82"), ".svg": (b"<svg", b"</svg>"), ".pdf": (b"%PDF", b"%%EOF")}
"""How an image begins and ends."""
COLOURS = ("#2f5d8a", "#c8553d", "#4f8a5b", "#8a6d3b", "#6b4f8a", "#7a7a7a")


def plotly() -> Any:
    try:
        import plotly.graph_objects as made
    except ImportError:
        raise MethodError("Pictures need plotly: pip install 'edif-hpc[plot]'.") from None
    return made


def heatmap(
    values: torch.Tensor,
    *,
    title: str,
    rows: Sequence[Any],
    columns: Sequence[str],
    row_name: str,
    column_name: str,
    scale_name: str,
    words: Sequence[Sequence[str]] | None = None,
    signed: bool = False,
    top: float | None = None,
) -> Any:
    """A map of (rows, columns), the first row at the bottom.

    It grows with them to `WIDEST` and `TALLEST`; from there on cells become smaller, names along its sides fewer, and
    words that no longer fit into the cells are seen under the mouse alone.

    Args:
        words: written into the cells.
        signed: white is 0, and both signs reach as far. top: where the scale ends; None: at the largest value.
    """
    made = plotly()
    shown = values.float()
    end = float(top if top is not None else shown.nan_to_num(0.0, 0.0, 0.0).abs().max() or 1.0)
    look = (
        {"colorscale": DIVERGING, "zmin": -end, "zmax": end}
        if signed
        else {"colorscale": RISING, "zmin": 0, "zmax": end}
    )
    wish = 62 if words is not None else 46
    width = min(WIDEST, max(560, wish * len(columns) + 2 * MARGIN))
    height = min(TALLEST, max(360, CELL * len(rows) + MARGIN))
    across, down = (width - 2 * MARGIN) / len(columns), (height - MARGIN) / len(rows)
    written: dict[str, Any] = {} if words is None else {"text": words}
    if words is not None and across >= LETTERS and down >= LINE:
        written |= {"texttemplate": "%{text}", "textfont": {"size": 11}}
    under = "<br>%{text}" if words is not None else ""
    cells = made.Heatmap(
        z=shown.tolist(), x=list(range(len(columns))), y=[str(row) for row in rows], xgap=int(across >= GAP_FROM),
        ygap=int(down >= GAP_FROM),
        colorbar={"title": {"text": f" <br>{scale_name}", "side": "right"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate=f"{row_name} %{{y}}, {column_name} %{{x}}<br>{scale_name} %{{z:.4g}}{under}<extra></extra>",
        **look, **written,
    )  # fmt: skip
    figure = made.Figure(cells)
    figure.update_layout(width=width, height=height)
    shown_at = list(range(0, len(columns), every(across)))
    numbered = len(shown_at) < len(columns)
    names = [f"{at} {visible(columns[at])}" if numbered else visible(columns[at]) for at in shown_at]
    figure.update_xaxes(title=column_name, showgrid=False, tickvals=shown_at, ticktext=names)
    figure.update_yaxes(title=row_name, showgrid=False, type="category")
    if (step := every(down)) > 1:
        figure.update_yaxes(tickvals=[str(row) for row in rows[::step]])
    return _dressed(figure, title)


def every(pixels: float) -> int:
    """Which of places of so many pixels are named: each of them, each second, fifth, tenth, …"""
    return next((step for step in STEPS if step * pixels >= TICK), STEPS[-1])


def labels(names: Sequence[str]) -> list[str]:
    """Names for a legend: with their numbers in front where two are the same."""
    shown = [visible(name) for name in names]
    return shown if len(set(shown)) == len(shown) else [f"{number} {name}" for number, name in enumerate(shown)]


def picked(number: int, count: int, what: str) -> int:
    """One of `count`, from 0; a negative number counts from the last.

    Raises:
        MethodError: there is none of that number.
    """
    if not -count <= number < count:
        raise MethodError(f"There is no {what} {number} in this result, which has {count}, from 0 to {count - 1}.")
    return number % count


def sites(values: torch.Tensor, result: Any, pair: int | None, position: int, **look: Any) -> Any:
    """A map of the sites that a patching went through: layers and positions, or layers and heads at one position.

    Args:
        values: (pairs, layers, positions), for heads (pairs, layers, positions, heads).
        result: of which `component`, `layers`, `tokens` and `heads` are taken.
        pair: one of them; None: their mean, without those that are NaN, under the tokens of the first.
        look: as `heatmap`.
    """
    one = 0 if pair is None else picked(pair, len(values), "pair")
    shown = values.nanmean(0) if pair is None else values[one]
    columns = tokens = result.tokens[one]
    column_name = "token"
    if result.component == "head":
        position = picked(position, shown.shape[1], "position")
        shown, columns = shown[:, position], [str(head) for head in result.heads]
        column_name = f"head, at {visible(tokens[position])!r}"
    return heatmap(shown, rows=result.layers, columns=columns, row_name="layer", column_name=column_name, **look)


def lines(
    series: dict[str, torch.Tensor], x: Sequence[float], *, title: str, x_name: str, y_name: str, zero: bool = False
) -> Any:
    """One line a series over the same x."""
    made = plotly()
    figure = made.Figure()
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        figure.add_scatter(
            x=list(x), y=values.float().tolist(), name=name, mode="lines+markers", line={"color": colour}
        )
    figure.update_layout(width=820, height=460, showlegend=1 < len(series) <= MOST_NAMED)
    figure.update_xaxes(title=x_name, showgrid=False, zeroline=False)
    figure.update_yaxes(title=y_name, showgrid=True, gridcolor="#e6e6e6", zeroline=zero, zerolinecolor="#b0b0b0")
    return _dressed(figure, title)


def bars(values: torch.Tensor, names: Sequence[str], *, title: str, x_name: str) -> Any:
    """One bar a name, the first at the top."""
    made = plotly()
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values.tolist()]
    figure = made.Figure(made.Bar(x=values.float().tolist(), y=list(names), orientation="h", marker={"color": colours}))
    figure.update_layout(width=820, height=min(2 * TALLEST, max(320, 26 * len(names) + MARGIN)))
    figure.update_xaxes(title=x_name, showgrid=True, gridcolor="#e6e6e6", zerolinecolor="#b0b0b0")
    figure.update_yaxes(autorange="reversed", type="category")
    return _dressed(figure, title)


def finished(figure: Any, path: str | Path | None) -> Any:
    """The figure, also written to `path` where one is given; the file is there whole or not at all.

    Raises:
        MethodError: the file's name ends in something that is no picture, or an image cannot be drawn here.
        OSError: it cannot be written there.
    """
    if path is None:
        return figure
    target = Path(path).expanduser()
    suffix = target.suffix.lower()
    if suffix not in (".html", *IMAGES):
        raise MethodError(
            f"A picture cannot be written as {target.name!r}; end the name in .html, {', '.join(IMAGES)}."
        )
    drawn = figure.to_html(include_plotlyjs=True).encode() if suffix == ".html" else _image(figure, target.name, suffix)
    with whole(target) as file:
        file.write(drawn)
    return figure


def _image(figure: Any, name: str, suffix: str) -> bytes:
    """The figure as an image.

    Raises:
        MethodError: there is no browser to draw it, or it drew none.
    """
    try:
        drawn: bytes = figure.to_image(format=suffix.removeprefix("."), scale=SCALE)
    except Exception as error:  # noqa: BLE001 - whatever befalls a browser, none of it is the user's
        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, ValueError) or "install" in str(error):
            raise MethodError(
                f"{name!r} needs kaleido and a Chrome or Chromium on PATH or in BROWSER_PATH ({told}): "
                "pip install 'edif-hpc[plot]' and install one, or write .html."
            ) from None
        raise MethodError(f"The browser could not draw {name!r} ({told}); write .html instead.") from None
    first, last = SIGNS[suffix]
    if first not in drawn[:1024] or last not in drawn[-1024:]:
        raise MethodError(f"The browser drew no image for {name!r} ({len(drawn)} bytes); write .html instead.")
    return drawn


def visible(token: str) -> str:
    """A token as a label: spaces and line ends are seen."""
    return (
        token.replace("\n", "↵").replace("\t", "⇥").replace("<", "&lt;")
        if token.strip(" ")
        else "␣" * max(1, len(token))
    )


def _dressed(figure: Any, title: str) -> Any:
    figure.update_layout(
        title={"text": title, "x": 0.02, "xanchor": "left", "font": {"size": 16}}, template="simple_white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#1b2a41"},
        margin={"l": 80, "r": 40, "t": 70, "b": 80}, paper_bgcolor="white", plot_bgcolor="white",
    )  # fmt: skip
    return figure
