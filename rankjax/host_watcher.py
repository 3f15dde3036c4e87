"""Run beside a host by `hosts.Watch`: says, when the host is gone, which host ended first.

Reads lines from its host: "step N", "done", "error WHY". Imports nothing but the standard library.
"""

import contextlib
import json
import pathlib
import sys
import time


def watch(folder: pathlib.Path, me: dict, grace: float) -> None:
    last, how = None, "ended without a word (killed, or out of memory)"
    for line in sys.stdin:
        kind, _, rest = line.rstrip("\n").partition(" ")
        if kind == "step":
            last = int(rest)
        elif kind == "done":
            return
        elif kind == "error":
            how = f"ended with {rest}"
    note = {**me, "step": last, "how": how, "at": time.time()}
    path = folder / "hosts" / f"{me['index']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(note))
    path.with_suffix(".tmp").replace(path)
    time.sleep(grace)
    print(told(folder, note), file=sys.stderr, flush=True)


def told(folder: pathlib.Path, mine: dict) -> str:
    """The message, from the notes of this run's hosts."""
    notes = [mine]
    for path in (folder / "hosts").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            note = json.loads(path.read_text())
            if note["index"] != mine["index"] and abs(note["at"] - mine["at"]) < 300:
                notes.append(note)
    first = min(notes, key=lambda note: note["at"])
    who = f"host {first['index']} of {first['count']} ({first['machine']}, pid {first['pid']})"
    at = "before the first step" if first["step"] is None else f"after step {first['step']}"
    missing = sorted(set(range(mine["count"])) - {note["index"] for note in notes})
    text = f"rankjax: {who} {first['how']} {at}"
    if first is mine and missing:
        # Had this one ended first, the others would have followed and noted it.
        lost = ", ".join(map(str, missing))
        text += f"; of host {lost} there is no sign: lost with its machine, or still running"
    elif first is not mine:
        text += f"; host {mine['index']} ended with it"
    steps = [p.name for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    kept = f"step {max(map(int, steps))} in {folder / 'checkpoints'}" if steps else "none"
    return f"{text}. Newest complete checkpoint: {kept}; start all hosts again to go on from there."


if __name__ == "__main__":
    watch(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))
