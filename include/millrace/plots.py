"""How pictures look: colours, size and type of every plot, and a chart as a file's bytes. It knows no data."""

from typing import Any

import altair as alt
import vl_convert

INK, FAINT, GRID = "#1c2430", "#6b7684", "#e6e9ee"
BLUE, GREEN, RED, GREY = "#2f6db3", "#2a8a5c", "#c2432d", "#8a94a3"
"""Told apart by people who don't see red and green too: the two are never the only difference."""

WIDTH, HEIGHT = 470, 270
"""Of a whole picture, in pixels: titles and axes included, so that two beside each other stand level."""


def data(rows: list[dict[str, Any]]) -> alt.Data:
    """What a chart draws."""
    return alt.Data(values=rows)


def svg(chart: Any, title: str, subtitle: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """One SVG element with a transparent background, for a page that needs neither network nor script."""
    drawn = str(vl_convert.vegalite_to_svg(_specification(chart, title, subtitle, width, height, "transparent")))
    return drawn[drawn.index("<svg") :]


def png(chart: Any, title: str, subtitle: str, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A PNG on white, two points a pixel."""
    return bytes(vl_convert.vegalite_to_png(_specification(chart, title, subtitle, width, height, "white"), scale=2))


def _specification(chart: Any, title: str, subtitle: str, width: int, height: int, background: str) -> dict[str, Any]:
    titled = chart.properties(
        width=width,
        height=height,
        autosize=alt.AutoSizeParams(type="fit", contains="padding"),
        title=alt.TitleParams(title, subtitle=subtitle, anchor="start", offset=12),
        background=background,
    )
    specification: dict[str, Any] = titled.to_dict()
    return specification | {
        "config": {
            "font": "Helvetica, Arial, sans-serif",
            "view": {"stroke": None},
            "title": {"fontSize": 14, "fontWeight": 600, "color": INK, "subtitleColor": FAINT, "subtitleFontSize": 12},
            "axis": {
                "labelColor": FAINT,
                "titleColor": FAINT,
                "titleFontWeight": "normal",
                "titleFontSize": 12,
                "labelFontSize": 12,
                "gridColor": GRID,
                "domainColor": GRID,
                "tickColor": GRID,
                "tickCount": 5,
            },
        }
    }
