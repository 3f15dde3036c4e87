"""The summary of `describe` as one HTML page: its figures and tables; nothing is loaded.

plotly.js stands in the page once, a content policy forbids it to load anything, and all text from
the log is escaped.
"""

import html
import json
from typing import Any

import plotly.graph_objects as go
import plotly.io
import plotly.offline

from rankjax.data import describe_text, event_log, spread

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
STYLE = """
body { margin: 0 auto; max-width: 1180px; padding: 20px; color: #1f2937; background: #f5f7fa;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; overflow-wrap: anywhere; }
section { margin: 0 0 18px; padding: 14px 20px; border: 1px solid #e3e7ee; border-radius: 10px;
  background: #fff; }
h2 { margin: 0 0 10px; font-size: 19px; }
.note { color: #5b6576; }
.scroll { max-height: 560px; overflow: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid #e3e7ee; text-align: left;
  white-space: nowrap; }
th { position: sticky; top: 0; background: #f0f3f7; }
"""
SCRIPT = """
for (const box of document.querySelectorAll(".plot")) {
  const spec = JSON.parse(box.querySelector("script").textContent);
  Plotly.newPlot(box, spec.data, spec.layout, { responsive: true, displaylogo: false });
}
"""
COLORS = ("#0b5cad", "#b7791f", "#12805c", "#b42318", "#6b4fa0", "#5b6576")


def page(summary: dict[str, Any]) -> str:
    """The whole page, of what `describe` returned."""
    name = html.escape(f"{summary['name']}, {summary['source'] or 'unknown source'}")
    notes = "".join(
        f'<p class="note">{html.escape(note)}</p>'
        for note in (*summary["notes"], *summary["not_applicable"])
    )
    times = "".join(
        f'<p class="note">{file}: {describe_text.moment(x["first"])} to '
        f"{describe_text.moment(x['last'])} UTC</p>"
        for file, x in summary["time"].items()
    )
    late = summary["events_after_last_impression"]
    times += f'<p class="note">events after the last impression: {late:,}</p>'
    figures = {
        "Impressions by day": _days(summary),
        "Label rate by day": _rates(summary),
        "Lengths of histories": _lengths(summary),
    }
    body = "".join(_section(title, _plot(figure)) for title, figure in figures.items())
    for title, (head, rows) in describe_text.tables(summary).items():
        if rows:
            body += _section(title, _table(head, rows))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n"
        f"<script>{plotly.offline.get_plotlyjs()}</script>\n</head>\n<body>\n"
        f"<h1>{name}</h1>{notes}{times}{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    line = lambda tag, cells: "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells)
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line("th", head)}</tr>{body}</table></div>'


def _plot(figure: go.Figure) -> str:
    spec = json.dumps(json.loads(plotly.io.to_json(figure, validate=False)))
    # as text in a script element nothing but "<" could end it
    spec = spec.replace("<", "\\u003c")
    return f'<div class="plot"><script type="application/json">{spec}</script></div>'


def _figure(y: str, x: str = "day (UTC)") -> go.Figure:
    grid = {"gridcolor": "#edf0f4", "zeroline": False}
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=320,
        margin={"l": 70, "r": 16, "t": 16, "b": 48},
        xaxis={"title": x, **grid},
        yaxis={"title": y, "rangemode": "tozero", "automargin": True, **grid},
        colorway=COLORS,
        showlegend=True,
    )
    return figure


def _days(summary: dict[str, Any]) -> go.Figure:
    figure, days = _figure("impressions"), summary["days"]
    figure.update_layout(barmode="stack", bargap=0)
    for name, counts in days["spans"].items():
        figure.add_trace(go.Bar(x=days["day"], y=counts, name=name))
    return figure


def _rates(summary: dict[str, Any]) -> go.Figure:
    """A line a task; a day's impressions that count stand in its hover box."""
    figure, days = _figure("label rate"), summary["days"]
    for name, x in days["tasks"].items():
        rates = [y / n if n else None for n, y in zip(x["rows"], x["positives"])]
        counts = [f"{y:,} of {n:,}" for n, y in zip(x["rows"], x["positives"])]
        figure.add_trace(
            go.Scatter(
                x=days["day"], y=rates, text=counts, name=html.escape(name), mode="lines+markers"
            )
        )
    return figure


def _lengths(summary: dict[str, Any]) -> go.Figure:
    figure = _figure(
        "share of impressions with at most so many", "events that a candidate may read"
    )
    for name in event_log.SPANS:
        x = summary["history"][name]
        if x["count"]:
            at = [*(x[p] for p in spread.NAMES), x["max"]]
            share = [*spread.QUANTILES, 1.0]
            figure.add_trace(go.Scatter(x=at, y=share, name=name, mode="lines+markers"))
    return figure
