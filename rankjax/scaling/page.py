"""The report's HTML: sections, tables and switches around the figures. All text is escaped."""

import json
import pathlib

import numpy as np
import plotly.offline
import polars

from rankjax.scaling import advice, architectures, figures, findings, markup

ASSETS = pathlib.Path(__file__).parent / "assets"
METRICS = ("ne", "auc")
# What the papers print, as they print it; other data, metrics and ranges than ours.
PUBLISHED = (
    ("UniMixer (arXiv 2604.00590)", "RankMixer", "ΔAUC = 0.002718 · P^0.116, P dense parameters"),
    ("UniMixer (arXiv 2604.00590)", "UniMixer", "ΔAUC = 0.003032 · P^0.132"),
    ("UniMixer (arXiv 2604.00590)", "UniMixer-Lite", "ΔAUC = 0.003767 · P^0.142"),
    ("DeRes (arXiv 2606.07980)", "DeRes", "exponent of AUC in compute 0.118"),
    ("DeRes (arXiv 2606.07980)", "OneTrans", "exponent of AUC in compute 0.071"),
    ("MTGR (arXiv 2505.18654), derived", "MTGR", "CTCVR GAUC gain ≈ .0053 + .00185 · ln(C / 6.36)"),
    ("LONGER (arXiv 2505.04421)", "LONGER", "AUC = .83719 · P^.00130 (R² .987)"),
    ("LONGER (arXiv 2505.04421)", "LONGER", "AUC = .82983 · FLOPs^.00126 (R² .967)"),
    (
        "RankMixer (arXiv 2507.15551), read off a figure",
        "RankMixer",
        "ΔAUC in % = .083 + .281 · log10(P / 1M)",
    ),
    (
        "RankMixer (arXiv 2507.15551), read off a figure",
        "HiFormer",
        "ΔAUC in % = .099 + .196 · log10(P / 1M)",
    ),
    ("OneTrans (arXiv 2510.26104)", "OneTrans", ".564 UAUC points per doubling of FLOPs"),
    ("OneTrans (arXiv 2510.26104)", "RankMixer", ".187 UAUC points per doubling of FLOPs"),
)


def render(found: findings.Findings, summed: dict, study: dict, timing) -> str:
    """Findings, their summary, study.json and timing (or None) -> the whole page."""
    sections = [
        ("Architectures", architectures.section(summed)),
        ("Quality against compute, size and data", _quality(found)),
        ("Which axis pays", _axes(found, summed)),
        ("Ladders, axis by axis", _ladders(found)),
        ("Frontier and comparisons", _frontier(found, summed)),
        ("Fitted laws", _laws(summed)),
        ("Learning rates", _rates(found)),
        ("Table rate and embedding scale", _tables(found)),
        ("Beside published exponents", _published(summed)),
        ("All sizes, mean ± std over seeds", _sizes(found)),
        ("All trials", _trials(found, timing)),
        ("Protocol", _protocol(found, study)),
    ]
    body = "".join(
        f'<section id="s{i}"><h2>{markup.escape(title)}</h2>{content}</section>'
        for i, (title, content) in enumerate(sections)
    )
    links = "".join(
        f'<a href="#s{i}">{markup.escape(title)}</a>' for i, (title, _) in enumerate(sections)
    )
    template = (ASSETS / "report.html").read_text(encoding="utf-8")
    parts = {
        "STYLE": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (ASSETS / "report.js").read_text(encoding="utf-8"),
        "PLOTLY": plotly.offline.get_plotlyjs(),
        "TITLE": markup.escape(study.get("name") or "Scaling study"),
        "FACTS": _facts(found, summed),
        "ADVICE": _noted(summed) + _advice(summed),
        "LINKS": links,
        "BODY": body,
    }
    out = [parts.get(piece, piece) for piece in template.split("%%")]
    return "".join(out)


def _by_metric(draw) -> str:
    return markup.switch({advice.METRICS[m]: draw(m) for m in METRICS})


def _facts(found, summed) -> str:
    counts = summed["counts"]
    budgets = ", ".join(markup.short(b) for b in counts["budgets"])
    facts = [
        f"{counts['final_trials']} final trials of {counts['trials']} runs",
        f"{counts['architectures']} architectures",
        f"{counts['seeds']} seed{'s' if counts['seeds'] != 1 else ''}",
        f"training impressions: {budgets or 'unknown'}",
    ]
    if summed["alarm"]["checked"]:
        rang = len(summed["alarm"]["rang"])
        facts.append(f"leak alarm: {f'rang in {rang}' if rang else 'silent in all'} trials")
    return "".join(f"<li>{markup.escape(fact)}</li>" for fact in facts)


def _noted(summed) -> str:
    """What the log's source says that every report must show."""
    items = "".join(f"<li>{markup.escape(text)}</li>" for text in summed["notes"])
    return f'<ul class="notes">{items}</ul>' if items else ""


def _advice(summed) -> str:
    good, rang = summed["advice"]["supported"], summed["alarm"]["rang"]
    kind = "bad" if rang else "good" if good else "open"
    out = f'<div class="advice {kind}"><p>{markup.escape(summed["advice"]["sentence"])}</p></div>'
    warned = summed["warnings"]
    if warned:
        items = "".join(f"<li>{markup.escape(w)}</li>" for w in warned)
        out += (
            f'<details class="warnings" open><summary>{len(warned)} '
            f"warning{'s' if len(warned) > 1 else ''}</summary><ul>{items}</ul></details>"
        )
    return out


def _quality(found) -> str:
    if found.final.is_empty():
        return markup.note("Nothing to draw.")
    inner = lambda m: markup.switch(
        {figures.TITLES[x]: markup.plot(figures.quality(found, m, x))
         for x in ("training_flops", "dense_params", "samples")},
        "against ",
    )  # fmt: skip
    note = (
        "A point is the mean over seeds of one size, its bar one standard deviation. Curves are "
        "the law of each architecture's own frontier (solid: power law; dashed: a line in log "
        "FLOPs, where no power law is supported) with its 95% band; an architecture without a "
        "curve supports neither. Click a name to hide it."
    )
    return _by_metric(inner) + markup.note(note)


def _axes(found, summed) -> str:
    if not any(found.rankings.values()):
        return markup.note("No axis has two sizes with the same seed, so no slope can be taken.")
    head = ["architecture", "axis", "metric", "per doubling of FLOPs", "95% interval", "rank"]
    rows = []
    for (name, metric), ranking in sorted(found.rankings.items(), key=lambda r: r[0][1] != "ne"):
        for entry in ranking:
            s = entry["slope"]
            span = "none" if s.low is None else f"{s.low:+.4f} to {s.high:+.4f}"
            overlap = ", ".join(entry["overlap"])
            rank = f"{entry['rank']}" + (f" (overlaps {overlap})" if overlap else "")
            cells = [name, s.axis, advice.METRICS[metric], f"{s.per_doubling:+.4f}", span, rank]
            cells += [f"{s.levels} × {s.seeds}", f"{s.doublings:.1f}"]
            rows.append([*cells, "; ".join([s.method, *s.warnings])])
    note = (
        "Change of the test metric per doubling of training FLOPs (per-impression FLOPs × "
        "impressions), moving one axis from the base, at the largest budget; the data axis moves "
        "the budget, averaged over all sizes that have several, at rates that were swept at the "
        "largest budget. Seeds are paired. Student t intervals; axes whose intervals "
        "overlap have no decided order."
    )
    return (
        _by_metric(lambda m: markup.plot(figures.axes(found, m)))
        + markup.note(note)
        + markup.table([*head, "levels × seeds", "doublings covered", "interval"], rows)
    )


def _ladders(found) -> str:
    pairs = dict.fromkeys(
        (c.architecture, c.axis) for c in found.curves if c.axis != "frontier" and len(c.rows)
    )
    if not pairs:
        return markup.note("No ladder has a final trial.")

    def grid(metric):
        cards = "".join(
            markup.card(
                f"{name} · {figures.AXES.get(axis, axis)}",
                markup.plot(figures.ladder(found, name, axis, metric)),
            )
            for name, axis in pairs
        )
        return f'<div class="grid">{cards}</div>'

    return _by_metric(grid) + markup.note(
        "Every point is one seed; a colour is a budget or a held size."
    )


def _frontier(found, summed) -> str:
    if found.final.is_empty():
        return markup.note("Nothing to draw.")
    rows = []
    for c in summed["comparisons"]:
        span = (
            "–"
            if c["range"] is None
            else f"{markup.short(c['range'][0])} to {markup.short(c['range'][1])}"
        )
        diff = "–" if c["difference"] is None else f"{c['difference']:+.4f}"
        limits = "–" if c["low"] is None else f"{c['low']:+.4f} to {c['high']:+.4f}"
        ahead = c["ahead"] or "undecided"
        cells = [f"{c['a']} − {c['b']}", advice.METRICS[c["metric"]], span, diff, limits, ahead]
        rows.append([*cells, c["reason"]])
    head = ["pair", "metric", "shared training FLOPs", "difference at their upper end", "95%"]
    note = (
        "The frontier holds the sizes that no cheaper size beats on validation. Pairs are "
        "compared on the laws of their own frontiers, only in the FLOPs that both cover; where "
        "a law is not supported, between their best sizes there (chosen on validation). Picking "
        "the best of noisy points flatters every frontier a little."
    )
    pairs = (
        markup.table([*head, "ahead", "why"], rows)
        if rows
        else markup.note("One architecture: no pair.")
    )
    return _by_metric(lambda m: markup.plot(figures.frontier(found, m))) + markup.note(note) + pairs


def _laws(summed) -> str:
    rows = []
    laws = summed["fits"] + [f["fit"] for f in summed["frontier"].values() if f["fit"]]
    for law in (x for x in laws if x["axis"] != "data" or x["line"]["ok"]):
        line, power = law["line"], law["power_law"]
        where = [law["architecture"], law["axis"], law["of"], advice.METRICS[law["metric"]]]
        b = line["intervals"].get("b")
        straight = "–" if line["b"] is None else f"{line['b']:+.4f}"
        straight += "" if b is None else f" [{b[0]:+.4f}, {b[1]:+.4f}]"
        words = "not fitted to AUC" if power is None else "; ".join(power["reasons"])
        if power is not None and power["ok"]:
            span = {
                k: f"{markup.number(v[0])}, {markup.number(v[1])}"
                for k, v in power["intervals"].items()
            }
            words = (
                f"E {markup.number(power['E'])} [{span['E']}], α {markup.number(power['alpha'])} "
            )
            words += f"[{span['alpha']}], A {markup.short(power['A'])}"
        notes = "; ".join([*line["reasons"], *line["warnings"]])
        rows.append([*where, str(law["points"]), straight, notes, words])
    head = "architecture,axis,of,metric,points,b of a + b·log10(FLOPs) [95%],its doubts"
    joint = [[name, _joint_words(law)] for name, law in summed["joint"].items()]
    note = (
        "L(x) = E + A·x^(−α), x training FLOPs: sum of Huber terms (δ = 0.001) on log residuals, "
        "best of many starts, 95% bootstrap intervals over sizes and seeds within them; where the "
        "data cannot support it the table says why. Lines have t intervals."
    )
    return (
        markup.note(note)
        + markup.table([*head.split(","), "power law, or why there is none"], rows)
        + "<h3>Joint law, E + A·params^(−α) + B·samples^(−β)</h3>"
        + markup.table(["architecture", "law, or why there is none"], joint)
    )


def _joint_words(law: dict) -> str:
    if law["reasons"]:
        return "; ".join(law["reasons"])
    E, alpha, beta = (markup.number(law[name]) for name in ("E", "alpha", "beta"))
    A, B = (markup.short(law[name]) for name in "AB")
    return f"E {E}, A {A}, α {alpha}, B {B}, β {beta}"


def _rates(found) -> str:
    names = dict.fromkeys(r["architecture"] for r in found.rates)
    if not names:
        return markup.note("No learning rate was swept.")
    cards = "".join(markup.card(n, markup.plot(figures.rates(found, n))) for n in names)
    note = (
        "Validation NE, one seed. The star is the rate chosen; between the swept sizes it is "
        "interpolated in log-log. A star at the sweep's edge is among the warnings."
    )
    return f'<div class="grid">{cards}</div>' + markup.note(note)


def _tables(found) -> str:
    if not found.tables:
        return markup.note("No table rate was tried.")
    out = ""
    for row in found.tables:
        best = row["best"]
        rate, scale = markup.short(best["table_learning_rate"]), markup.short(best["embedding_std"])
        chosen = markup.note(f"Lowest validation NE: table rate {rate}, embedding scale {scale}.")
        drawn = markup.plot(figures.tables(found, row["architecture"]))
        out += (
            f'<div class="card"><h3>{markup.escape(row["architecture"])}</h3>{drawn}{chosen}</div>'
        )
    return f'<div class="grid">{out}</div>' + markup.note("At each architecture's smallest size.")


def _published(summed) -> str:
    rows = [[*row, ""] for row in PUBLISHED]
    for law in summed["fits"]:
        if law["axis"] != "frontier":
            continue
        line, power = law["line"], law["power_law"]
        if law["metric"] == "auc" and line["ok"] and line["intervals"]:
            per = [100 * np.log10(2) * v for v in (line["b"], *line["intervals"]["b"])]
            words = f"{per[0]:.3f} AUC points per doubling of training FLOPs"
            rows.append(["this study", law["architecture"], words, f"{per[1]:.3f} to {per[2]:.3f}"])
        elif law["metric"] == "ne" and power is not None and power["ok"]:
            low, high = power["intervals"]["alpha"]
            words = f"exponent α of NE in training FLOPs {power['alpha']:.3f}"
            rows.append(["this study", law["architecture"], words, f"{low:.3f} to {high:.3f}"])
        else:
            words = f"no law of {advice.METRICS[law['metric']]} is supported"
            rows.append(["this study", law["architecture"], words, ""])
    return markup.table(["source", "architecture", "law", "95% interval"], rows) + markup.note(
        "Orientation only: the papers' data, metrics, sizes and what counts as FLOPs differ."
    )


def _sizes(found) -> str:
    head = "architecture,axis,value,T/S,L,D,impressions,dense params,FLOPs per impression"
    rows = []
    for c in found.cells.to_dicts():
        numbers = ("axis_value", "tokens", "layers", "width", "budget", "dense_params")
        cells = [c["architecture"], c["axis"] or "–"]
        cells += [markup.cell(c[n]) for n in (*numbers, "flops_valid", "training_flops")]
        cells += [(markup.spread(c, f"test_{m}"), markup.key(c[f"test_{m}"])) for m in METRICS]
        rows.append(cells)
    names = [*head.split(","), "training FLOPs", "test NE", "test AUC"]
    return markup.table(names, rows, sortable=True) + markup.note("Click a column's head to sort.")


def _trials(found, timing) -> str:
    trials = found.trials
    if timing is not None and "trial" in timing.columns:
        seconds = [c for c in ("seconds_total", "step_ms", "mfu") if c in timing.columns]
        more = timing.select("trial", *seconds).unique("trial", keep="last")
        more = more.select(c for c in more.columns if c == "trial" or c not in trials.columns)
        trials = trials.join(
            more.with_columns(polars.col("trial").cast(polars.String)), "trial", "left"
        )
    names = [
        *("trial", "stage", "architecture", "axis", "axis_value", "seed", "budget"),
        *("learning_rate", "table_learning_rate", "embedding_std", "dense_params"),
        *("training_flops", "padding_share", "validation_ne", "test_ne", "test_auc"),
        *("progressive_ne", "alarm", "seconds_total", "step_ms", "mfu"),
    ]
    names = [n for n in names if n in trials.columns]
    rows = [[markup.cell(row[n], n) for n in names] for row in trials.to_dicts()]
    shown = markup.table(names, rows, sortable=True)
    return f"<details><summary>{len(rows)} rows</summary>{shown}</details>"


def _protocol(found, study: dict) -> str:
    asked = study["study"] if isinstance(study.get("study"), dict) else study
    command = study.get("command") or asked.get("command")
    rows = [
        [
            "split",
            "train, validation (choices of rates and sizes) and test (fits, figures) by time",
        ],
        ["footing", "FLOPs, budgets and batch sizes per valid impression; training = 3 × forward"],
    ]
    known = ("organisations", "history", "budgets", "seeds", "learning_rates", "table_rates")
    known += ("embedding_stds",)
    rows += [[k.replace("_", " "), json.dumps(asked[k])] for k in known if k in asked]
    training = asked.get("training")
    if isinstance(training, dict):
        rows += [
            [k.replace("_", " "), json.dumps(v)]
            for k, v in training.items() if not isinstance(v, dict)
        ]  # fmt: skip
    out = markup.table(["what", "how"], rows)
    if command:
        out = f"<pre>{markup.escape(command)}</pre>" + out
    whole = markup.escape(json.dumps(study, indent=1, default=str))
    return out + f"<details><summary>study.json</summary><pre>{whole}</pre></details>"
