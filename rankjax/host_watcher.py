"""Run beside a host by `hosts.Watch`: says which host ended first, and ends its own after that one.

Reads lines from its host: "step N", "done", "error WHY"; the end of the pipe is the host's end.
When another host has ended badly, its watcher's note appears in the folder: then this host, which
waits for that one in a step, is ended too. Imports nothing but the standard library.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import sys
import time

WORDLESS = "ended without a word (killed, or out of memory)"
ENDED = "was ended by its watcher"


def watch(folder: pathlib.Path, me: dict, grace: float, pipe: int = 0) -> str | None:
    """Until the host ends; the message to print, None where it ended well."""
    last, how, rest, other = None, WORDLESS, b"", None
    while True:
        if select.select([pipe], [], [], 1.0)[0]:
            read = os.read(pipe, 4096)
            if not read:
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                kind, _, what = line.decode(errors="replace").partition(" ")
                if kind == "done":
                    return None
                last = int(what) if kind == "step" else last
                how = f"ended with {what}" if kind == "error" else how
        elif other is None and notes_of_others(folder, me):
            other = time.monotonic()
        elif other is not None and time.monotonic() - other > grace:
            how = ENDED
            with contextlib.suppress(ProcessLookupError):
                os.kill(me["pid"], signal.SIGKILL)
    note = {**me, "step": last, "how": how, "at": time.time()}
    path = folder / "hosts" / f"{me['index']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(note))
    path.with_suffix(".tmp").replace(path)
    time.sleep(2 * grace + 2)  # the others need a moment to end after it, and to say so
    return message(folder, note)


def notes_of_others(folder: pathlib.Path, me: dict) -> list[dict]:
    """How other hosts of this run ended, so far as their watchers have told."""
    found = []
    for path in (folder / "hosts").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return [x for x in found if x["index"] != me["index"] and x["run"] == me["run"]]


def message(folder: pathlib.Path, mine: dict) -> str:
    notes = [mine, *notes_of_others(folder, mine)]
    # Whoever went without a word pulled down those that then met an error or waited for it; their
    # clocks are not so equal that the times could tell.
    rank = {WORDLESS: 0, ENDED: 2}
    first = min(notes, key=lambda note: (rank.get(note["how"], 1), note["at"]))
    who = f"host {first['index']} of {first['count']} ({first['machine']}, pid {first['pid']})"
    at = "before the first step" if first["step"] is None else f"after step {first['step']}"
    text = f"rankjax: {who} {first['how']} {at}"
    missing = sorted(set(range(mine["count"])) - {note["index"] for note in notes})
    if first is not mine:
        text += f"; host {mine['index']} ended with it"
    if missing:
        lost = ", ".join(map(str, missing))
        text += f"; of host {lost} there is no sign: lost with its machine, or still running"
    steps = [p.name for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    kept = f"step {max(map(int, steps))} in {folder / 'checkpoints'}" if steps else "none"
    return f"{text}. Newest complete checkpoint: {kept}; start all hosts again to go on from there."


if __name__ == "__main__":
    told = watch(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))
    if told:
        print(told, file=sys.stderr, flush=True)
