"""Findings in words: one sentence of advice that they support, the axes' order, the warnings."""

import numpy as np

from rankjax.scaling import findings, slopes

AXES = {
    "T": "the number of feature tokens",
    "S": "the history length",
    "L": "the number of layers",
    "D": "the width",
    "all": "all axes at once",
    "data": "the training data",
}
METRICS = {"ne": "NE", "auc": "AUC"}


def advise(found: findings.Findings, metric: str = "ne") -> dict:
    """{"sentence", "supported", "architecture", "axes", "reasons"}: what to scale, or why unknown.

    An architecture is named where it is ahead of every other at the upper end of the FLOP range
    both cover; an axis where its slope improves and overlaps no other's; several axes where all of
    them improve and only their order is open. A leak alarm that rang voids any advice.
    """
    names = [c["architecture"] for c in found.best]
    nothing = {"supported": False, "architecture": None, "axes": []}
    if found.alarms["rang"]:
        why = f"the leak alarm rang in {len(found.alarms['rang'])} trial(s)"
        sentence = f"The results support no advice: {why}, so test metrics cannot be trusted."
        return {**nothing, "sentence": sentence, "reasons": [why]}
    winner, lost = _winner(found, names, metric)
    axes = {name: _axes(found, name, metric) for name in names}
    chosen = [winner] if winner else [n for n in names if axes[n]["decided"] or len(names) == 1]
    reasons = [lost] if lost else []
    reasons += [f"{n}: {axes[n]['reason']}" for n in chosen or names if axes[n]["reason"]]
    parts = [_axis_words(name, axes[name], metric) for name in chosen if axes[name]["axes"]]
    if winner:
        rivals = ", ".join(n for n in names if n != winner)
        lead = f"Scale {winner}, which is ahead of {rivals} at the most training FLOPs that both "
        lead += "cover; "
        sentence = lead + (parts[0] if parts else f"which axis is open: {axes[winner]['reason']}")
    elif parts:
        lead = "" if len(names) == 1 else "No architecture is decidedly ahead; "
        sentence = lead + "; ".join(parts)
    else:
        why = [lost] if lost else []
        if any(a["first"] is not None for a in axes.values()):
            why.append("no axis has a slope that a doubling of FLOPs or more tells from 0")
        elif names:
            why.append("no axis has two sizes")
        why = "; ".join(why) or "there is no final trial with a test NE"
        return {**nothing, "sentence": f"The fits support no advice: {why}.", "reasons": reasons}
    named = winner or (chosen[0] if len(chosen) == 1 else None)
    return {
        "sentence": sentence[0].upper() + sentence[1:] + ".", "supported": True,
        "architecture": named, "axes": axes[named]["axes"] if named else [], "reasons": reasons,
    }  # fmt: skip


def _winner(found, names, metric) -> tuple[str | None, str]:
    """The architecture that beats every other, or None and why."""
    rows = [c for c in found.comparisons if c["metric"] == metric]
    if not rows:
        return None, ""
    for name in names:
        mine = [c for c in rows if name in (c["a"], c["b"])]
        wins = [
            c["result"] is not None and c["result"].winner is not None
            and c[c["result"].winner] == name
            for c in mine
        ]  # fmt: skip
        if mine and all(wins):
            return name, ""
    open_ones = [c for c in rows if c["result"] is None or c["result"].winner is None]
    if not open_ones:
        return None, "no architecture is ahead of all others"
    first = open_ones[0]
    why = f"{first['a']} against {first['b']} is undecided ({first['reason']})"
    more = len(open_ones) - 1
    return None, why + (f", and {more} other pair{'s' if more > 1 else ''} too" if more else "")


def _axes(found, name: str, metric: str) -> dict:
    """The axes of one architecture that pay, and whether their lead is decided.

    size: where the data lead, the size axis next to them, if it too pays and overlaps none.
    """
    ranking = found.rankings.get((name, metric), [])
    out = {"axes": [], "decided": False, "first": None, "size": None, "only": False, "reason": ""}
    if not ranking:
        return {**out, "reason": "no axis has two sizes"}
    first, rest = ranking[0], ranking[1:]
    slope = out["first"] = first["slope"]
    if slope.better <= 0:
        why = slope.method if slope.low is None else "its interval includes 0"
        if slope.doublings < 1:
            why = slope.warnings[-1]
        return {**out, "reason": f"even the steepest slope, along {slope.axis}, is open ({why})"}
    other = {r["slope"].axis: r["slope"] for r in rest}
    out["axes"] = [slope.axis] + [a for a in first["overlap"] if other[a].better > 0]
    if not first["overlap"]:
        paying = rest and slope.axis == "data" and rest[0]["slope"].better > 0
        size = rest[0]["slope"] if paying and not rest[0]["overlap"] else None
        return {**out, "decided": True, "only": not rest, "size": size}
    reason = f"the intervals of {', '.join([slope.axis, *first['overlap']])} overlap"
    unknown = [axis for axis in first["overlap"] if other[axis].better <= 0]
    if unknown:
        reason += f", and {', '.join(unknown)} may gain nothing"
    return {**out, "reason": reason}


def _axis_words(name: str, axes: dict, metric: str) -> str:
    """ "for hstu, more of S (the history length) pays most: ..." """
    slope, verb = axes["first"], "lowers" if slopes.lower_is_better(metric) else "raises"
    amount = (
        f"each doubling of training FLOPs along it {verb} the test {METRICS[metric]} by "
        f"{abs(slope.per_doubling):.4f} ({_span(slope)})"
    )
    what = _axis(slope.axis)
    if not axes["decided"]:
        return f"for {name}, {what} has the steepest slope: {amount}, though {axes['reason']}"
    if axes["only"]:
        return f"for {name}, {what}, the only axis tried, pays: {amount}"
    second = axes["size"]
    if second is None:
        return f"for {name}, {what} pays most: {amount}"
    size = f"{_axis(second.axis)} ({abs(second.per_doubling):.4f})"
    return f"for {name}, {what} pays most: {amount}; among its sizes it is {size}"


def _axis(axis: str) -> str:
    return AXES[axis] + ("" if axis in ("data", "all") else f" ({axis})") if axis in AXES else axis


def _span(slope: slopes.Slope) -> str:
    low, high = sorted((abs(slope.low), abs(slope.high)))
    return f"95%: {low:.4f} to {high:.4f}"


def ranking_words(name: str, metric: str, ranking: list[dict]) -> str:
    """ "rankmixer, NE per doubling of training FLOPs: 1. D -0.0041 [...]; ...", ties as ties."""
    if not ranking:
        return f"{name}, {METRICS[metric]}: no axis has two sizes to compare."
    parts = []
    for entry in ranking:
        slope = entry["slope"]
        span = (
            "no interval" if slope.low is None else f"{slope.low:+.4f} to {slope.high:+.4f}"
        )  # fmt: skip
        tie = f", overlaps {', '.join(entry['overlap'])}" if entry["overlap"] else ""
        parts.append(f"{entry['rank']}. {slope.axis} {slope.per_doubling:+.4f} ({span}{tie})")
    return f"{name}, {METRICS[metric]} per doubling of training FLOPs: {'; '.join(parts)}."


def warnings(found: findings.Findings, trees: dict | None = None) -> list[str]:
    """Everything a reader must know before believing the report, most serious first.

    trees: what baseline.json holds, or None where they were not run.
    """
    out = []
    rang = found.alarms["rang"]
    if rang:
        shown = ", ".join(rang[:5]) + (" and others" if len(rang) > 5 else "")
        out.append(f"The leak alarm rang: a model beat the oracle by more than chance in {shown}.")
    if found.final.is_empty():
        out.append("No final trial has a test NE and training FLOPs; nothing can be fitted.")
        return out
    if found.dropped:
        out.append(
            f"{found.dropped} final trial(s) are left out: test NE or FLOPs undefined (a diverged "
            "run, or an evaluation split with one class only)."
        )
    lost = found.final.filter(~findings.finite("test_auc")).height
    if lost:
        out.append(f"Test AUC is undefined in {lost} of {found.final.height} final trials.")
    out += _trees_warnings(found, trees) + _design_warnings(found) + _sweep_warnings(found)
    for curve in found.curves:
        if curve.power is not None and curve.power.ok:
            where = f"{curve.architecture}, {curve.axis} ({curve.label})"
            out += [f"Power law of {where}: {w}" for w in curve.power.warnings]
    for name, joint in found.joints.items():
        out += [f"Joint law of {name}: {w}" for w in joint.warnings]
    return out


def _trees_warnings(found, trees: dict | None) -> list[str]:
    if trees is None or trees["test_ne"] is None or not found.best:
        return []
    best = min(found.best, key=lambda row: row["test_ne"])
    std, freedom = found.spread["ne"]
    margin = 2 * std if freedom else 0.0
    if best["test_ne"] < trees["test_ne"] - margin:
        return []
    if best["test_ne"] < trees["test_ne"]:
        return [
            f"{best['architecture']}, the best, is ahead of gradient-boosted trees on the same "
            f"features by no more than seeds differ: test NE {best['test_ne']:.4f} against "
            f"{trees['test_ne']:.4f}."
        ]
    return [
        "No architecture beats gradient-boosted trees on the same features: test NE "
        f"{trees['test_ne']:.4f} (trees) against {best['test_ne']:.4f} ({best['architecture']}, "
        "the best)."
    ]


def _design_warnings(found) -> list[str]:
    out = []
    seeds = found.final["seed"].n_unique()
    if seeds < 2 or not found.spread["ne"][1]:
        out.append(
            "One seed a size: the spread over seeds is unknown, differences between two single "
            "trials may be chance, and ties cannot be told."
        )
    if found.final["budget"].n_unique() < 2:
        out.append("One data budget: nothing can be said about scaling the data.")
    names = found.final["architecture"].unique().to_list()
    if len(names) < 2:
        out.append("One architecture: nothing can be said about which to scale.")
    if found.baseline not in names:
        out.append(f"No plain DNN ({found.baseline}) is in this study to compare with.")
    for slope in found.slopes:
        if slope.metric == "ne" and slope.warnings:
            where = f"{slope.architecture}, {slope.axis}"
            out.append(f"Slope of {where}: {'; '.join(slope.warnings)}.")
    return out


def _sweep_warnings(found) -> list[str]:
    out = []
    for row in found.rates:
        if not any(ne is not None and np.isfinite(ne) for ne in row["validation_ne"]):
            out.append(
                f"{row['architecture']}, {row['axis']} = {_number(row['axis_value'])}: none of the "
                f"rates {row['rates']} gave a validation NE (diverged, or a span of one class); "
                "the choice is arbitrary. Column `undefined` or `failed` says why."
            )
        if row["edge"]:
            end = "below" if row["edge"] == "lowest" else "above"
            out.append(
                f"{row['architecture']}, {row['axis']} = {_number(row['axis_value'])}: the best "
                f"learning rate, {row['best']:g}, is the {row['edge']} tried; a better one may lie "
                f"{end}, and the fits understate this size."
            )
    for row in found.tables:
        if row["edge"]:
            out.append(
                f"{row['architecture']}: the best table learning rate, "
                f"{row['best']['table_learning_rate']:g}, is the {row['edge']} tried."
            )
    return out


def _number(value) -> str:
    return "?" if value is None or not np.isfinite(value) else f"{value:g}"
