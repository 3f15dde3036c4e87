"""A log written again in other shards, or as one: the same rows, in a stream."""

import os
import pathlib
from collections.abc import Sequence

from rankjax.data import event_log, shards, tally


def split(
    log_folder: str | os.PathLike,
    out: str | os.PathLike,
    count: int | None,
    only: Sequence[int] | None = None,
) -> pathlib.Path:
    """Writes a log into the folder `out` in `count` shards (None: as one) and returns `out`.

    only: of a log in shards, those to take. All of a log keeps its fingerprint, so that trials on
    it are the same trials. Where this lies in `out` already, nothing happens.
    Memory: a chunk of rows; of a log in shards, 8 bytes an impression too.

    Raises ValueError: the log has fewer shards or users, or `out` holds something else.
    """
    log, out = event_log.EventLog.open(log_folder, shards=only), pathlib.Path(out)
    starts = shards.starts(log.rows("users"), count)
    if event_log.is_prepared(out, log.fingerprint, count):
        return out
    with event_log.LogWriter(out, log.schema, log.fingerprint, starts) as writer:
        for file in event_log.FILES:
            for chunk in tally.chunks(log.rows(file)):
                writer.append(file, {name: x[chunk] for name, x in log.columns[file].items()})
        return writer.finish(**log.info)
