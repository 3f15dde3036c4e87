"""From the user's own files and a schema.toml to a log (docs/own-data.md).

Four stages, each of which leaves files in a working folder beside the log, so that an interrupted
import goes on where it was:
  read    every file in chunks, columns checked and called by their roles (own/reading.py)
  learn   users, items, spans, vocabularies, moments (own/learning.py)
  sort    every chunk as rows of the log, sorted (own/rows.py, own/runs.py)
  write   the sorted chunks merged in ranges into the log (own/writing.py), counters added
The workers of an engine hash the files, read and sort them, and put requests together; this process
learns, and merges into the log.
Memory is bounded by a chunk, the distinct ids and times, the events of one user, and the
impressions of one second, one request or, without requests, one user; with [negatives] by those of
one hour or day.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.progress

from rankjax.data import columns, counters, event_log, stores
from rankjax.data import engine as engine_lib
from rankjax.data import shards as shards_lib
from rankjax.data.own import (
    learning,
    places,
    plan,
    reading,
    requests,
    rows,
    runs,
    schema_file,
    writing,
)
from rankjax.data.sources import files as source_files

VERSION = 2
CHUNK = 1 << 20  # rows of a file that are held at once


def fingerprint(
    schema: schema_file.ImportSchema,
    parts: Sequence[plan.Part],
    chunk: int,
    engine: engine_lib.Engine = engine_lib.here,
) -> dict[str, Any]:
    """What the log is made from: the schema, every file's hash, and the chunks' size."""
    text = json.dumps(_said(schema), default=str)
    paths = list(dict.fromkeys(p.path for p in parts))
    hashes = dict(zip(paths, engine(source_files.sha256, paths)))
    return {
        "source": "import",
        "version": VERSION,
        "schema": hashlib.sha256(text.encode()).hexdigest(),
        "files": {_role(p): hashes[p.path] for p in parts},
        "chunk": chunk,
    }


def _role(part: plan.Part) -> str:
    return f"{part.tag}: {part.path.name}"


def _said(x: Any) -> Any:
    """A schema without what is at its default, so that a key that a later version adds changes no
    fingerprint. Keys stay as they stand: features and labels take their order in the log from it.
    """
    if dataclasses.is_dataclass(x):
        pairs = ((f, getattr(x, f.name)) for f in dataclasses.fields(x))
        return {f.name: _said(value) for f, value in pairs if value != _default(f)}
    if isinstance(x, dict):
        return {name: _said(value) for name, value in x.items()}
    return [_said(value) for value in x] if isinstance(x, tuple | list) else x


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def run(
    schema: schema_file.ImportSchema,
    files: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    chunk: int = CHUNK,
    shards: int | None = None,
    engine: engine_lib.Engine = engine_lib.here,
) -> pathlib.Path:
    """Writes the log of these files into `out` and returns it; twice does nothing.

    An interrupted import leaves a folder .<out>.import beside `out`; the next call goes on from it.
    chunk: rows held at once; it decides the working memory (about 1 KB a row).
    shards: how many to write the log in, by users (shards.py); None: a log of one.
    engine: who does what can be done in pieces: this process, or workers that share the file system
      (engine.py). The log is the same to the byte.
    Raises ValueError: the schema does not fit the files, a value does not fit its role, no
    impression is left, `out` holds something else. The message names file, column, row.
    """
    out, schema = checked_out(out), plan.resolve(schema)
    shards_lib.check(shards)
    slots = tuple(plan.slots(schema))
    _check(schema, slots)
    parts = tuple(plan.parts(schema, [places.place(f) for f in files]))
    unused = plan.check_columns(schema, parts)
    work = out.parent / f".{out.name}.import"
    made_of = fingerprint(schema, parts, chunk, engine)
    final = made_of
    if schema.counters is not None:
        final = counters.fingerprint(made_of, schema.counters)
    if not event_log.is_prepared(out, final, shards):
        _begin(work, made_of)
        job = writing.Job(schema, None, parts, slots, work, chunk)
        os.rename(_made(job, made_of, unused, shards, engine), out)
    shutil.rmtree(work, ignore_errors=True)  # also of a call that ended just before it did this
    return out


def checked_out(out: str | os.PathLike) -> pathlib.Path:
    """The log's folder; ValueError where it cannot be written there."""
    out = stores.mounted(out)
    if out.exists() and not (out / "log.json").exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out}: found something that is no log, expected none, or this log")
    return out


def _made(
    job: writing.Job,
    made_of: dict[str, Any],
    unused: list[str],
    shards: int | None,
    engine: engine_lib.Engine,
) -> pathlib.Path:
    """All four stages; the folder of the finished log, in the working folder."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        counted = _read(job, progress, engine)
        learned = learning.learn(job.schema, job.parts, job.chunks, job.work)
        found = plan.log_schema(job.schema, job.slots, learning.sizes(learned))
        job = dataclasses.replace(job, log_schema=found)
        lost = _sort(job, progress, engine)
        info = {"unused_columns": unused, "rows": counted, "lost": lost}
        # Whatever a kill leaves lies in `work`. Shards are written by whoever writes last.
        made, last = job.work / "log", job.schema.counters is None
        made_in = shards if last else None
        if not event_log.is_prepared(made, made_of, made_in):
            writing.write(job, learned, made, made_of, info, made_in, engine)
        if not last:
            made = counters.add(made, job.work / "counted", job.schema.counters, shards)
    return made


def _check(schema: schema_file.ImportSchema, slots: Sequence[plan.Slot]) -> None:
    """Raises ValueError, before any file is read, where the log's schema would contradict itself or
    nothing says which events lie before an impression."""
    found = plan.log_schema(schema, slots, {})
    for file in columns.FILES:
        columns.kinds(file, found)
    learning.settings(slots)
    if schema.negatives is not None and not schema.time_exact:
        raise ValueError("[negatives] need exact times, found time_exact = false")
    nobody = not all(x.user for x in (*schema.events, *schema.impressions))
    if schema.user.ids == "given" and nobody:
        raise ValueError("[user] ids = 'given': found a table without `user`, expected it in all")
    timed = [x for x in schema.events if not x.list]
    ordered = {bool(x.order) for x in (*timed, *schema.impressions)}
    by_row = any(x.time == schema_file.ROW and not x.order for x in schema.impressions)
    if timed and (len(ordered) > 1 or by_row):
        raise ValueError(
            "[events], [impressions]: found `order`, or time = '@row', in some of them only; "
            "expected `order` in all (but lists), or times in all, else they do not compare"
        )


def _begin(work: pathlib.Path, made_of: dict[str, Any]) -> None:
    """The working folder, emptied where it is of another import."""
    note = work / "import.json"
    text = json.dumps(made_of, sort_keys=True)
    if work.exists() and (not note.exists() or note.read_text() != text):
        print(
            f"{work}: an unfinished import of other files or another schema; begun anew",
            file=sys.stderr,
        )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(text)


def _read(
    job: writing.Job, progress: rich.progress.Progress, engine: engine_lib.Engine
) -> dict[str, dict[str, int]]:
    """Stage read, a piece a file. Returns {file in its role: rows read and kept}."""
    bar = progress.add_task("reading", total=len(job.parts))
    counted = {}
    work = functools.partial(_read_part, job)
    for part, found in zip(job.parts, engine(work, range(len(job.parts)))):
        counted[_role(part)] = found
        progress.advance(bar)
    return counted


def _read_part(job: writing.Job, number_of_part: int) -> dict[str, int]:
    part = job.parts[number_of_part]  # a copy of it would not be known for one of job.schema's
    done = job.work / f"read.{part.tag}.json"
    if not done.exists():
        read = kept = 0
        chunks = reading.chunks(part.path, part.spec, job.schema, job.chunk)
        for number, (until, frame) in enumerate(chunks):
            path = job.work / f"read.{part.tag}.{number:06d}.arrow"
            if not path.exists():
                runs.write(path, frame)
            read, kept = until, kept + frame.height
        _note(done, {"read": read, "kept": kept})
    return json.loads(done.read_text())


def _note(path: pathlib.Path, found: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.rename(path)


def _sort(
    job: writing.Job, progress: rich.progress.Progress, engine: engine_lib.Engine
) -> dict[str, dict[str, int]]:
    """Stage sort, a piece a chunk. Returns what was lost on the way, by feature."""
    total: dict[str, dict[str, int]] = {}
    acts = [i for i, p in enumerate(job.parts) if p.table in ("events", "impressions")]
    pieces = [(i, number) for i in acts for number in range(len(job.paths(job.parts[i])))]
    bar = progress.add_task("sorting", total=len(pieces))
    for lost in engine(functools.partial(_sort_chunk, job), pieces):
        for feature, counts in lost.items():
            into = total.setdefault(feature, dict.fromkeys(counts, 0))
            for what, n in counts.items():
                into[what] += n
        progress.advance(bar)
    return {name: x for name, x in total.items() if any(x.values())}


@functools.lru_cache(maxsize=1)
def _learned(folder: pathlib.Path, stamp: int) -> learning.Learned:
    """What a folder's learned.json, written at `stamp`, says; once for all chunks."""
    return learning.load(folder)


def _sort_chunk(job: writing.Job, piece: tuple[int, int]) -> dict[str, dict[str, int]]:
    (number_of_part, number), schema, slots = piece, job.schema, job.slots
    part = job.parts[number_of_part]
    done = job.work / f"sort.{part.tag}.{number:06d}.json"
    if not done.exists():
        learned = _learned(job.work, (job.work / "learned.json").stat().st_mtime_ns)
        frame = runs.read(job.paths(part)[number])
        lost: dict[str, dict[str, int]] = {}
        name = f"{part.tag}.{number:06d}.arrow"
        if part.table == "events":
            found = rows.events(schema, part, frame, learned, slots, lost)
            runs.write_run(job.work / f"past.{name}", found, rows.EVENT_KEYS)
            if schema.negatives is not None:
                bucket = requests.BUCKETS[schema.negatives.within]
                found = rows.clicks(schema, part, frame, learned, slots, lost, bucket)
                runs.write_run(job.work / f"click.{name}", found, rows.CLICK_KEYS)
        else:
            found = rows.impressions(schema, part, frame, learned, slots, lost)
            keys = requests.keys_of(part.spec)
            runs.write_run(job.work / f"shown.{part.number}.{name}", found, keys)
        _note(done, lost)
    return json.loads(done.read_text())
