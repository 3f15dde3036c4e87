"""Plotly figures of the findings. Every piece of text from the data is HTML-escaped.

Plotly reads a small HTML (links included) in labels, legends and hover boxes, so a name from a log
or a study must not reach them raw.
"""

import html

import numpy as np
import plotly.graph_objects as go
import polars

from rankjax.scaling import findings, markup, slopes

COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B"),
    *("#1B9E77", "#B2182B", "#7F7F7F", "#A6761D", "#4D4D9F", "#66A61E", "#F781BF", "#17BECF"),
)
GREY, INK = "#8a94a6", "#1f2937"
SYMBOLS = {
    **{"T": "circle", "S": "circle", "L": "square", "D": "diamond", "all": "star"},
    "data": "triangle-up",
}
AXES = {
    **{"T": "tokens T", "S": "history S", "L": "layers L", "D": "width D", "all": "all at once"},
    "data": "data",
}
TITLES = {
    "ne": "test NE (lower is better)",
    "auc": "test AUC (higher is better)",
    "training_flops": "training FLOPs",
    "dense_params": "dense parameters",
    "samples": "training impressions",
    "learning_rate": "dense learning rate",
}


def text(value) -> str:
    """Any text from data, safe inside a label."""
    return html.escape(str(value))


def colors(found: findings.Findings) -> dict[str, str]:
    """One colour an architecture, the same in every figure."""
    names = found.trials["architecture"].unique(maintain_order=True).to_list()
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def quality(found: findings.Findings, metric: str, x: str) -> go.Figure:
    """Seed means of all final cells against x, error bars one std; laws of the frontiers."""
    figure, color = _figure(TITLES[x], TITLES[metric], log_x=True), colors(found)
    column = f"test_{metric}"
    cells = found.cells.filter(findings.finite(column) & findings.finite(x) & (polars.col(x) > 0))
    if x == "training_flops":
        for curve in found.curves:
            if curve.axis == "frontier" and curve.metric == metric:
                _law(figure, curve, color[curve.architecture], legend=False)
    for (name, axis), rows in cells.group_by(["architecture", "axis"], maintain_order=True):
        figure.add_trace(
            go.Scatter(
                x=rows[x].to_list(),
                y=rows[column].to_list(),
                mode="markers",
                name=text(f"{name} · {axis}"),
                legendgroup=text(name),
                error_y={"type": "data", "array": _filled(rows[f"{column}_std"]), "width": 2},
                marker={"color": color[name], "symbol": SYMBOLS.get(axis, "x"), "size": 9},
                text=[_cell_text(row) for row in rows.to_dicts()],
                hovertemplate="%{text}<br>%{x:.3s}: %{y:.4f}<extra></extra>",
            )
        )
    envelope = found.envelope[metric]
    if x == "training_flops" and len(envelope):
        line = {"color": INK, "width": 1.5, "dash": "dot", "shape": "hv"}
        figure.add_trace(
            go.Scatter(
                x=envelope[x].to_list(),
                y=envelope[column].to_list(),
                mode="lines",
                line=line,
                name="frontier, all architectures",
                hoverinfo="skip",
            )
        )
    if metric == "ne" and found.oracle_ne is not None and len(cells):
        _oracle(figure, found.oracle_ne, cells[column].min(), cells[column].max())
    return _decades(figure)


def ladder(found: findings.Findings, architecture: str, axis: str, metric: str) -> go.Figure:
    """One architecture along one axis: every seed, the laws with their bands, a colour a budget.

    The data axis joins the budgets of each size instead.
    """
    figure = _figure(TITLES["training_flops"], TITLES[metric], log_x=True, height=320)
    curves = [
        c for c in found.curves
        if (c.architecture, c.axis, c.metric) == (architecture, axis, metric) and len(c.rows)
    ]  # fmt: skip
    column = f"test_{metric}"
    for curve, color in zip(curves, COLORS * (1 + len(curves) // len(COLORS))):
        rows = curve.rows.sort("training_flops")
        if axis == "data":
            means = rows.group_by("budget", maintain_order=True).agg(
                polars.col("training_flops", column).mean()
            )
            line = {"color": color, "width": 1.5}
            figure.add_trace(
                go.Scatter(
                    x=means["training_flops"].to_list(),
                    y=means[column].to_list(),
                    mode="lines",
                    line=line,
                    showlegend=False,
                    legendgroup=text(curve.label),
                    hoverinfo="skip",
                )
            )
        else:
            _law(figure, curve, color, legend=False)
        figure.add_trace(
            go.Scatter(
                x=rows["training_flops"].to_list(),
                y=rows[column].to_list(),
                mode="markers",
                name=text(curve.label or "all impressions"),
                legendgroup=text(curve.label),
                marker={"color": color, "size": 8, "opacity": 0.75},
                text=[_cell_text(row) for row in rows.to_dicts()],
                hovertemplate="%{text}<br>%{x:.3s}: %{y:.4f}<extra></extra>",
            )
        )
    figure.update_layout(showlegend=axis != "data" or len(curves) <= 5)
    return _decades(figure)


def frontier(found: findings.Findings, metric: str) -> go.Figure:
    """All cells in grey, those on the compute-optimal frontier named, and its law."""
    figure, color = _figure(TITLES["training_flops"], TITLES[metric], log_x=True), colors(found)
    column = f"test_{metric}"
    cells = found.cells.filter(findings.finite(column))
    figure.add_trace(
        go.Scatter(
            x=cells["training_flops"].to_list(),
            y=cells[column].to_list(),
            mode="markers",
            marker={"color": "#c9ced8", "size": 6},
            name="dominated",
            hoverinfo="skip",
        )
    )
    curve = found.envelope_curves.get(metric)
    if curve is not None:
        _law(figure, curve, INK, legend=True)
    envelope = found.envelope[metric]
    for (name,), rows in envelope.group_by(["architecture"], maintain_order=True):
        figure.add_trace(
            go.Scatter(
                x=rows["training_flops"].to_list(),
                y=rows[column].to_list(),
                mode="markers",
                marker={"color": color[name], "size": 12, "line": {"color": "white", "width": 1}},
                name=text(name),
                text=[_cell_text(row) for row in rows.to_dicts()],
                hovertemplate="%{text}<br>%{x:.3s}: %{y:.4f}<extra></extra>",
            )
        )
    return _decades(figure)


def axes(found: findings.Findings, metric: str) -> go.Figure:
    """Gain per doubling of training FLOPs along every axis, with 95% intervals; right is better."""
    sign = -1 if slopes.lower_is_better(metric) else 1
    what = "reduction of test NE" if sign < 0 else "rise of test AUC"
    color = colors(found)
    entries = [
        entry["slope"]
        for (_, m), ranking in found.rankings.items() if m == metric
        for entry in ranking
    ]  # fmt: skip
    figure = _figure(f"{what} per doubling of training FLOPs", "", height=110 + 30 * len(entries))
    for name in dict.fromkeys(s.architecture for s in entries):
        own = [s for s in entries if s.architecture == name]
        gain = [sign * s.per_doubling for s in own]
        reach = [abs(s.high - s.per_doubling) if s.high is not None else None for s in own]
        figure.add_trace(
            go.Scatter(
                x=gain,
                y=[text(f"{name} · {s.axis}") for s in own],
                mode="markers",
                error_x={"type": "data", "array": reach, "thickness": 2.5, "width": 5},
                marker={"color": color[name], "size": 11},
                name=text(name),
                text=[text(s.method) for s in own],
                hovertemplate="%{y}: %{x:.4f}<br>%{text}<extra></extra>",
            )
        )
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(showlegend=False)
    return figure


def rates(found: findings.Findings, architecture: str) -> go.Figure:
    """Validation NE against the learning rate, a line a swept size; the best is a star."""
    figure = _figure(TITLES["learning_rate"], "validation NE", log_x=True, height=320)
    own = [r for r in found.rates if r["architecture"] == architecture]
    _ticks(figure, {rate for row in own for rate in row["rates"]})
    for row, color in zip(own, COLORS * (1 + len(own) // len(COLORS))):
        label = text(f"{row['axis']} = {_plain(row['axis_value'])}")
        edge = f" ({row['edge']} tried)" if row["edge"] else ""
        figure.add_trace(
            go.Scatter(
                x=row["rates"],
                y=row["validation_ne"],
                mode="lines+markers",
                name=label + edge,
                line={"color": color},
                marker={"size": 7},
                hovertemplate=label + ", rate %{x:g}: %{y:.4f}<extra></extra>",
            )
        )
        if row["best"] is not None:
            best = row["validation_ne"][row["rates"].index(row["best"])]
            star = {
                "color": color,
                "size": 15,
                "symbol": "star",
                "line": {"color": INK, "width": 1},
            }
            figure.add_trace(
                go.Scatter(
                    x=[row["best"]],
                    y=[best],
                    mode="markers",
                    marker=star,
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
    return figure


def tables(found: findings.Findings, architecture: str) -> go.Figure:
    """Validation NE against the table rate, a line an embedding scale."""
    figure = _figure("table learning rate", "validation NE", log_x=True, height=320)
    row = next(r for r in found.tables if r["architecture"] == architecture)
    _ticks(figure, {r["table_learning_rate"] for r in row["tried"]})
    scales = sorted({r["embedding_std"] for r in row["tried"] if r["embedding_std"] is not None})
    for scale, color in zip(scales, COLORS):
        own = [r for r in row["tried"] if r["embedding_std"] == scale]
        figure.add_trace(
            go.Scatter(
                x=[r["table_learning_rate"] for r in own],
                y=[r["validation_ne"] for r in own],
                mode="lines+markers",
                name=f"embedding scale {scale:g}",
                line={"color": color},
            )
        )
    return figure


def _oracle(figure, oracle: float, low: float, high: float) -> None:
    """A line at the oracle's NE, or words where a line would squeeze all points together."""
    label = f"oracle NE {oracle:.4f}"
    if low - oracle <= high - low:
        line = {"color": GREY, "dash": "dash"}
        figure.add_hline(y=oracle, line=line, annotation_text=label)
        return
    note = {"xref": "paper", "yref": "paper", "x": 0.01, "y": 0.02, "showarrow": False}
    figure.add_annotation(text=f"{label}, {low - oracle:.4f} below the best point", **note)


def _law(figure, curve: findings.Curve, color: str, *, legend: bool) -> None:
    """The supported law: solid a power law, dashed a line in log FLOPs; its band shaded."""
    law = curve.best
    if law is None or not law.x_range[0] < law.x_range[1]:
        return
    x = np.geomspace(*law.x_range, 60)
    low, high = law.band(x)
    shade = "rgba({},{},{},0.14)".format(*(int(color[i : i + 2], 16) for i in (1, 3, 5)))
    figure.add_trace(
        go.Scatter(
            x=np.concatenate([x, x[::-1]]).tolist(),
            y=np.concatenate([high, low[::-1]]).tolist(),
            fill="toself",
            fillcolor=shade,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            mode="lines",
            legendgroup=text(curve.architecture),
        )
    )
    is_line = isinstance(law, slopes.Line)
    figure.add_trace(
        go.Scatter(
            x=x.tolist(),
            y=law.predict(x).tolist(),
            mode="lines",
            hoverinfo="skip",
            line={"color": color, "width": 2, "dash": "dash" if is_line else "solid"},
            name="line in log FLOPs" if is_line else "power law",
            showlegend=legend,
            legendgroup=text(curve.architecture),
        )
    )


def _cell_text(row: dict) -> str:
    """Architecture, sizes, budget and seeds of a trial or cell, for hover boxes."""
    sizes = zip(("T/S", "L", "D"), (row["tokens"], row["layers"], row["width"]))
    words = [row["architecture"]] + [f"{n} {v:g}" for n, v in sizes if v is not None]
    if row.get("budget") is not None:
        words.append(f"{row['budget']:,.0f} impressions")
    if "seeds" in row:
        words.append(f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}")
    elif row.get("seed") is not None:
        words.append(f"seed {row['seed']:g}")
    return text(", ".join(words))


def _ticks(figure, values) -> None:
    """Ticks at the values that were tried."""
    values = sorted(v for v in values if v is not None)
    figure.update_xaxes(tickvals=values, ticktext=[f"{v:g}" for v in values])


def _decades(figure, most: int = 7) -> go.Figure:
    """Ticks of a logarithmic axis at 1, 2, 5 of every decade, or fewer where many are covered.

    Plotly's own either hide the power of ten or run into each other on a small figure.
    """
    x = np.array([v for trace in figure.data for v in trace.x or () if v is not None and v > 0])
    if not len(x):
        return figure
    first, last = int(np.floor(np.log10(x.min()))), int(np.ceil(np.log10(x.max())))
    for leading in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in leading]
        ticks = [t for t in ticks if x.min() / 1.5 <= t <= x.max() * 1.5]
        if len(ticks) <= most:
            break
    figure.update_xaxes(tickvals=ticks, ticktext=[markup.short(t) for t in ticks])
    return figure


def _plain(value) -> str:
    return "?" if value is None else f"{value:g}"


def _filled(series: polars.Series) -> list:
    return series.fill_null(0.0).fill_nan(0.0).to_list()


def _figure(x: str, y: str, *, log_x: bool = False, height: int = 460) -> go.Figure:
    figure = go.Figure()
    grid = {"gridcolor": "#edf0f4", "linecolor": "#c9ced8", "zeroline": False, "ticks": "outside"}
    figure.update_xaxes(title=x, type="log" if log_x else "linear", **grid)
    figure.update_yaxes(title=y, automargin=True, **grid)
    figure.update_layout(
        height=height,
        template="none",
        margin={"l": 64, "r": 16, "t": 16, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={
            "orientation": "h",
            "y": -62 / (height - 130),
            "yanchor": "top",
            "font": {"size": 12},
        },
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="white",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#b6bdc9"},
        hoverlabel={"align": "left"},
    )
    return figure
