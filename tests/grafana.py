"""Draws a Grafana dashboard from its JSON and a Prometheus, so that people can look at what panels would show: places,
titles, units, legends and colours as the JSON has them, asked as Grafana asks. It is no Grafana: lines are plain.
"""

import html
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

COLUMN, ROW, GAP = 60, 30, 6  # pixels of Grafana's grid: 24 columns
PALETTE = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d")
COLOURS = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}


def in_unit(value: float, unit: str) -> str:
    """A number as Grafana writes it, about; fails for a unit that no panel had so far."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        return (
            f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s" if value < 60 else f"{value / 60:.3g} min"
        )
    if unit == "h":
        return f"{value:.3g} hours" if value < 24 else f"{value / 24:.3g} days"
    if unit == "bytes":
        return f"{value:.3g} B" if value < 1024 else f"{value / 1024:.4g} KiB"
    return {"short": f"{value:.4g}", "reqps": f"{value:.3g} req/s"}[unit]


@dataclass
class Series:
    """What a panel calls it, its labels, and its values by time."""

    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]


@dataclass
class Panel:
    """A panel and what its queries gave."""

    content: Mapping[str, Any]
    series: list[Series] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int, int, int]:
        grid = self.content["gridPos"]
        return grid["x"], grid["y"], grid["w"], grid["h"]

    @property
    def unit(self) -> str:
        return self.content["fieldConfig"]["defaults"]["unit"]


def legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template)


def ask(prometheus: str, target: Mapping[str, Any], seconds: float) -> list[Series]:
    """The series of a query: the values of now, or of the last so many seconds, as the target wants it."""
    now, expr = time.time(), target["expr"].replace("$__rate_interval", "1m")
    path, more = ("query", {"time": now}) if target.get("instant") else ("query_range", {"start": now - seconds})
    more |= {} if target.get("instant") else {"end": now, "step": max(1, seconds / 120)}
    answer = httpx.get(f"{prometheus}/api/v1/{path}", params={"query": expr, **more}, timeout=20).json()
    assert answer["status"] == "success", (expr, answer)
    found = []
    for item in answer["data"]["result"]:
        values = item.get("values") or [item["value"]]
        points = [(float(at), float(value)) for at, value in values if value not in ("NaN", "+Inf", "-Inf")]
        if points:
            found.append(Series(legend(target["legendFormat"], item["metric"]), item["metric"], points))
    return found


def look(prometheus: str, board: Mapping[str, Any], seconds: float = 120) -> list[Panel]:
    """Every panel with its data; rows have none."""
    panels = []
    for content in board["panels"]:
        panel = Panel(content)
        for target in content.get("targets", ()):
            panel.series += ask(prometheus, target, seconds)
        panels.append(panel)
    return panels


def colour_of(panel: Panel, value: float) -> str:
    steps = panel.content["fieldConfig"]["defaults"]["thresholds"]["steps"]
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return COLOURS[reached[-1]]


def stat(panel: Panel) -> str:
    series = panel.series[-1]
    value = series.points[-1][1]
    text = series.name if panel.content["options"]["textMode"] == "name" else in_unit(value, panel.unit)
    return f'<div class="stat" style="color:{colour_of(panel, value)}">{html.escape(text)}</div>'


def lines(panel: Panel, width: int, height: int) -> str:
    times = [at for series in panel.series for at, _ in series.points]
    begin, end = min(times), max(times)
    top = max([value for series in panel.series for _, value in series.points] + [1e-9])
    entries, drawn = [], [f'<text x="0" y="10">{in_unit(top, panel.unit)}</text>']
    for number, series in enumerate(panel.series):
        colour = PALETTE[number % len(PALETTE)]
        places = [
            (width * (at - begin) / max(1, end - begin), 12 + (height - 12) * (1 - max(0, value) / top))
            for at, value in series.points
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn.append(f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="2.5" fill="{colour}"/>')
        last = in_unit(series.points[-1][1], panel.unit)
        entries.append(f'<span style="color:{colour}">&#9644;</span> {html.escape(series.name)} {last}')
    return f'<svg width="{width}" height="{height}">{"".join(drawn)}</svg><p>{" &nbsp; ".join(entries)}</p>'


def heatmap(panel: Panel, width: int, height: int) -> str:
    """Cumulative buckets, as Prometheus has them, one below the other's difference."""
    ordered = sorted(panel.series, key=lambda series: float(series.labels["le"]))
    rows, below = [], dict[float, float]()
    for series in ordered:
        rows.append({at: max(0, value - below.get(at, 0)) for at, value in series.points})
        below = dict(series.points)
    times = sorted({at for row in rows for at in row})
    most = max([value for row in rows for value in row.values()] + [1e-9])
    across, down = width / len(times), height / len(rows)
    cells = [
        f'<rect x="{times.index(at) * across:.1f}" y="{height - (number + 1) * down:.1f}" width="{across:.1f}" '
        f'height="{down:.1f}" fill="#f2cc0c" fill-opacity="{value / most:.2f}"/>'
        for number, row in enumerate(rows)
        for at, value in row.items()
    ]
    names = [
        f'<text x="0" y="{height - number * down - 2:.1f}">{series.name}</text>'
        for number, series in enumerate(ordered)
    ]
    return f'<svg width="{width}" height="{height}">{"".join(cells + names)}</svg>'


def table(panel: Panel) -> str:
    """Rows by their labels, a column for each query."""
    names = list(dict.fromkeys(target["legendFormat"] for target in panel.content["targets"]))
    rows: dict[tuple, dict[str, float]] = {}
    for series in panel.series:
        rows.setdefault(tuple(sorted(series.labels.items())), {})[series.name] = series.points[-1][1]
    labels = sorted({name for row in rows for name, _ in row})
    head = "".join(f"<th>{html.escape(name)}</th>" for name in [*labels, *names])
    body = ""
    for row, values in list(rows.items())[:8]:
        cells = [dict(row).get(name, "") for name in labels]
        cells += [in_unit(values[name], panel.unit) if name in values else "" for name in names]
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


STYLE = """
body { background: #111217; color: #ccccdc; font: 12px sans-serif; margin: 8px; position: relative }
div.panel { background: #181b1f; border: 1px solid #2c3235; box-sizing: border-box; overflow: hidden; padding: 6px;
  position: absolute }
div.row { font-size: 15px; padding-top: 6px; position: absolute }
h2 { font-size: 12px; margin: 0 0 4px } p { font-size: 10px; margin: 2px 0 } text { fill: #9fa7b3; font-size: 9px }
div.stat { font-size: 26px; text-align: center } table { font-size: 10px } td, th { padding: 1px 6px; text-align: left }
"""


def drawn(panel: Panel) -> str:
    x, y, w, h = panel.place
    place = f"left:{x * COLUMN}px;top:{y * (ROW + GAP)}px;width:{w * COLUMN - GAP}px;height:{h * (ROW + GAP) - GAP}px"
    title = html.escape(panel.content["title"])
    kind = panel.content["type"]
    if kind == "row":
        return f'<div class="row" style="{place}">{title}</div>'
    width, height = w * COLUMN - GAP - 14, h * (ROW + GAP) - GAP - 70
    inside = "No data"
    if panel.series:
        drawings = {"stat": lambda: stat(panel), "table": lambda: table(panel)}
        drawings |= {
            "timeseries": lambda: lines(panel, width, height),
            "heatmap": lambda: heatmap(panel, width, height),
        }
        inside = drawings[kind]()
    return f'<div class="panel" style="{place}"><h2>{title}</h2>{inside}</div>'


def page(board: Mapping[str, Any], panels: Sequence[Panel]) -> str:
    bottom = max(y + h for _, y, _, h in (panel.place for panel in panels)) * (ROW + GAP) + 20
    inside = "".join(map(drawn, panels))
    title = html.escape(board["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<body><div style="height:{bottom}px;width:{24 * COLUMN}px">{inside}</div></body></html>'
    )


def overlaps(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """Pairs of panels of which one lies on the other."""
    found = []
    for number, one in enumerate(panels):
        for other in panels[number + 1 :]:
            (x, y, w, h), (a, b, c, d) = one.place, other.place
            if x < a + c and a < x + w and y < b + d and b < y + h:
                found.append((one.content["title"], other.content["title"]))
    return found
