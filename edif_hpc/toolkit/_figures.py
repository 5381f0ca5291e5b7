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

DIVERGING, RISING = "RdBu", "Blues"
IMAGES = (".png", ".svg", ".pdf")
SCALE = 2
"""Pixels of an image for each of the figure's own."""
CELL, MARGIN = 30, 150
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
    """A map of (rows, columns), the first row at the bottom; `words` are written into the cells.

    Args:
        signed: white is 0, and both signs reach as far. top: where the scale ends; None: at the largest value.
    """
    made = plotly()
    shown = values.float()
    end = float(top if top is not None else shown.abs().max() or 1.0)
    look = (
        {"colorscale": DIVERGING, "zmin": -end, "zmax": end}
        if signed
        else {"colorscale": RISING, "zmin": 0, "zmax": end}
    )
    written = {"text": words, "texttemplate": "%{text}", "textfont": {"size": 11}} if words is not None else {}
    cells = made.Heatmap(
        z=shown.tolist(), x=list(range(len(columns))), y=[str(row) for row in rows], xgap=1, ygap=1,
        colorbar={"title": {"text": f" <br>{scale_name}", "side": "right"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate=f"{row_name} %{{y}}, {column_name} %{{x}}<br>{scale_name} %{{z:.4g}}<extra></extra>",
        **look, **written,
    )  # fmt: skip
    figure = made.Figure(cells)
    wide = 62 if words is not None else 46
    figure.update_layout(
        width=max(560, wide * len(columns) + 2 * MARGIN), height=max(360, min(1400, CELL * len(rows)) + MARGIN)
    )
    ticks = {"tickvals": list(range(len(columns))), "ticktext": [visible(column) for column in columns]}
    figure.update_xaxes(title=column_name, showgrid=False, **ticks)
    figure.update_yaxes(title=row_name, showgrid=False, type="category")
    return _dressed(figure, title)


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
        pair: one of them; None: their mean, under the tokens of the first.
        look: as `heatmap`.
    """
    one = 0 if pair is None else picked(pair, len(values), "pair")
    shown = values.mean(0) if pair is None else values[one]
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
    figure.update_layout(width=820, height=460, showlegend=len(series) > 1)
    figure.update_xaxes(title=x_name, showgrid=False, zeroline=False)
    figure.update_yaxes(title=y_name, showgrid=True, gridcolor="#e6e6e6", zeroline=zero, zerolinecolor="#b0b0b0")
    return _dressed(figure, title)


def bars(values: torch.Tensor, names: Sequence[str], *, title: str, x_name: str) -> Any:
    """One bar a name, the first at the top."""
    made = plotly()
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values.tolist()]
    figure = made.Figure(made.Bar(x=values.float().tolist(), y=list(names), orientation="h", marker={"color": colours}))
    figure.update_layout(width=820, height=max(320, 26 * len(names) + MARGIN))
    figure.update_xaxes(title=x_name, showgrid=True, gridcolor="#e6e6e6", zerolinecolor="#b0b0b0")
    figure.update_yaxes(autorange="reversed", type="category")
    return _dressed(figure, title)


def finished(figure: Any, path: str | Path | None) -> Any:
    """The figure, also written to `path` where one is given.

    Raises:
        MethodError: the file's name ends in something that is no picture, or an image cannot be drawn here.
    """
    if path is None:
        return figure
    target = Path(path).expanduser()
    if target.suffix == ".html":
        figure.write_html(target, include_plotlyjs=True)
        return figure
    if target.suffix not in IMAGES:
        raise MethodError(
            f"A picture cannot be written as {target.name!r}; end the name in .html, {', '.join(IMAGES)}."
        )
    try:
        figure.write_image(target, scale=SCALE)
    except (ValueError, RuntimeError) as error:
        raise MethodError(
            f"{target.name!r} needs kaleido and a Chrome or Chromium on PATH or in BROWSER_PATH "
            f"({str(error).strip().splitlines()[0]}): pip install 'edif-hpc[plot]' and install one, or write .html."
        ) from None
    return figure


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
