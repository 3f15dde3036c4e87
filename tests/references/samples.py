"""Samples and batch rows of a log, impression by impression in plain Python."""

import math

import numpy as np

SPANS = ("train", "validation", "test")


def build(files, organisation, *, history, max_candidates, max_realtime, window, span, key="time"):
    """Samples as dicts in order of their first candidates; rows are the log's."""
    shown, happened = files["impressions"], files["events"]
    groups = {}
    for row in range(len(shown["user"])):
        if shown["span"][row] != SPANS.index(span):
            continue
        name = {
            "impression": row,
            "request": int(shown["request"][row]),
            "window": (int(shown["user"][row]), int(shown["time"][row]) // window),
        }[organisation]
        groups.setdefault(name, []).append(row)
    events = {}
    for row, user in enumerate(happened["user"]):
        events.setdefault(int(user), []).append(row)

    def past(row):
        mine = events.get(int(shown["user"][row]), [])
        return [e for e in mine if happened[key][e] < shown[key][row]]

    found = []
    for rows in groups.values():
        parts = []
        for row in rows:
            fits = (
                parts
                and len(parts[-1]) < max_candidates
                and len(past(row)) - len(past(parts[-1][0])) <= max_realtime
            )
            if fits:
                parts[-1].append(row)
            else:
                parts.append([row])
        for part in parts:
            old = past(part[0])
            new = past(part[-1])[len(old) :]
            found.append(
                {
                    "user": int(shown["user"][part[0]]),
                    "time": int(shown["time"][part[0]]),
                    "old": old[-history:] if history else [],
                    "new": new,
                    "candidates": part,
                    "reads": [set(past(row)) for row in part],
                }
            )
    return sorted(found, key=lambda sample: sample["candidates"][0])


def log_age(seconds):
    return 1 if seconds < 2 else 1 + int(math.log2(seconds))


def item_age(seconds):
    return np.log1p(max(seconds, 0) / 86_400)
