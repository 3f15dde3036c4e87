"""Pieces of HTML: escaped text, numbers, sortable tables, figures, switches."""

import html
import json

import numpy as np
import plotly.graph_objects as go
import plotly.io


def escape(value) -> str:
    """Any text, safe between tags and in quoted attributes."""
    return html.escape(str(value), quote=True)


def number(value, digits: int = 4) -> str:
    """.8123, or – where undefined."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def short(value) -> str:
    """1.2e+12 as 1.2e12, 4500 as 4,500, – where undefined."""
    if value is None or not np.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def spread(row: dict, column: str) -> str:
    """ "0.8123 ± 0.0004 (3 seeds)" from a cell's mean, std and n."""
    value, std, n = row[column], row[f"{column}_std"], row[f"{column}_n"]
    if value is None:
        return "undefined"
    noun = "seed" if n == 1 else "seeds"
    return number(value) + (f" ± {number(std)}" if std is not None else "") + f" ({n} {noun})"


def table(head, rows, *, sortable: bool = False) -> str:
    """Rows of text -> a table; cells are escaped; (shown, key) sorts by key."""
    out = []
    for row in rows:
        cells = []
        for entry in row:
            shown, order = entry if isinstance(entry, tuple) else (entry, None)
            attribute = "" if order is None else f' data-key="{escape(order)}"'
            cells.append(f"<td{attribute}>{escape(shown)}</td>")
        out.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th>{escape(h)}</th>" for h in head)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(out)}</tbody></table></div>"
    )


def plot(figure: go.Figure) -> str:
    """A figure without plotly.js, which the page holds once; drawn when it comes into view."""
    spec = plotly.io.to_json(figure, validate=False)
    # As text in a script element nothing but "<" could end it.
    spec = json.dumps(json.loads(spec)).replace("<", "\\u003c")
    return f'<div class="plot"><script type="application/json">{spec}</script></div>'


def switch(panels: dict[str, str], name: str = "") -> str:
    """Buttons that show one of the panels; labels are ours, not the data's."""
    buttons = "".join(f"<button>{escape(label)}</button>" for label in panels)
    shown = "".join(f'<div class="panel">{content}</div>' for content in panels.values())
    return f'<div class="switch"><div class="buttons">{escape(name)}{buttons}</div>{shown}</div>'


def card(title, content: str) -> str:
    """A titled box; the title is text, the content is HTML."""
    return f'<div class="card"><h3>{escape(title)}</h3>{content}</div>'


def note(text: str) -> str:
    """A paragraph of explanation, from plain text."""
    return f'<p class="note">{escape(text)}</p>'


def cell(value, column: str = "") -> tuple[str, str] | str:
    """A value as shown, and the key that its column sorts by."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "–" if value is None else str(value)
    return (number(value) if column.endswith(("_ne", "_auc")) else short(value), key(value))


def key(value) -> str:
    """What a sortable column compares; empty sorts last."""
    return "" if value is None or not np.isfinite(value) else repr(float(value))
