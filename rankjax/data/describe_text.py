"""The summary of `describe` for a terminal, and the words that its page shows too."""

import datetime
from typing import Any

from rankjax.data import event_log, spread

SPREAD = ("mean", "std", "min", *spread.NAMES, "max")


def number(value: float | None) -> str:
    """1,234 or 0.1234 or 1.2e+09; - where undefined."""
    if value is None:
        return "-"
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(share: float | None) -> str:
    """12.3%; - where undefined."""
    return "-" if share is None else f"{100 * share:.3g}%"


def moment(seconds: int | None) -> str:
    """Seconds since 1970 as "2024-05-31 12:00:00" (UTC), or as they are where no calendar has them;
    - where undefined."""
    if seconds is None:
        return "-"
    try:
        moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    except OverflowError:
        return f"{seconds} s"
    return moment.isoformat(sep=" ")


def tables(summary: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """{title: (head, rows)}: the summary as tables of text."""
    s, spans = summary, event_log.SPANS
    share = lambda x: [percent((x["unseen"] or {}).get(name)) for name in spans[1:]]
    rates = lambda t: [
        f"{number(t[name]['rate'])} ({t[name]['positives']:,} of {t[name]['rows']:,})"
        for name in ("all", *spans)
    ]
    long = lambda name, x: [name, number(x["count"]), percent(x["zeros"]), *map(number, _of(x))]
    distribution = ["count", "zero", *SPREAD]
    return {
        "Rows": (["what", "rows"], [[name, f"{n:,}"] for name, n in s["rows"].items()]),
        "Spans": (
            ["span", "impressions", "share", "requests", "first (UTC)", "last (UTC)"],
            [
                [
                    *(name, f"{x['impressions']:,}", percent(x["share"]), f"{x['requests']:,}"),
                    *(moment(x["first"]), moment(x["last"])),
                ]
                for name, x in s["spans"].items()
            ],
        ),
        "Label rates": (
            ["label", "counts where", "all", *spans],
            [[name, t["weight"] or "everywhere", *rates(t)] for name, t in s["tasks"].items()],
        ),
        "Lengths": (
            ["of", *distribution],
            [long(f"history, {name}", s["history"][name]) for name in ("all", *spans)]
            + [long("candidates of a request", s["candidates"])]
            + [long("events of a user", s["events_per_user"])],
        ),
        "Users and items": (
            ["", "known", "shown", "never shown", *(f"new in {name}" for name in spans[1:])],
            [
                [name, *(f"{x[k]:,}" for k in ("known", "shown", "never_shown")), *share(x)]
                for name, x in (("users", s["users"]), ("items", s["items"]))
            ],
        ),
        "Features of ids": (
            ["feature", "side", "table", "rows", "distinct", "missing"]
            + [f"new in {name}" for name in spans[1:]],
            [
                [
                    *(f["name"], f["side"], f["table"], f"{f['rows']:,}", f"{f['distinct']:,}"),
                    *(percent(f["missing"]), *share(f)),
                ]
                for f in s["id_features"]
            ],
        ),
        "Tables": (
            ["table", "rows", "distinct", "hashed"],
            [
                [t["name"], f"{t['rows']:,}", f"{t['distinct']:,}", "yes" if t["hashed"] else "no"]
                for t in s["tables"]
            ],
        ),
        "Dense features": (
            ["feature", "over", *distribution],
            [[f["name"], f["of"], *long("", f)[1:]] for f in s["dense_features"]],
        ),
    }


def _of(x: dict[str, Any]) -> list[float | None]:
    return [x[name] for name in SPREAD]


def text(summary: dict[str, Any]) -> str:
    """The summary for a terminal: notes, ranges of time, and its tables; days are left to the page.

    Nothing but text: control characters of names are shown, not sent.
    """
    lines = [f"{summary['name']} ({summary['source'] or 'unknown source'})"]
    lines += [f"note: {note}" for note in (*summary["notes"], *summary["not_applicable"])]
    for file, x in summary["time"].items():
        lines.append(f"{file}: {moment(x['first'])} to {moment(x['last'])} UTC")
    late = summary["events_after_last_impression"]
    lines.append(f"events after the last impression: {late:,}")
    for title, (head, rows) in tables(summary).items():
        if rows:
            lines += ["", title, *_aligned([head, *rows])]
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in x) for x in lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
