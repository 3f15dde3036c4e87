"""Blocks of the world to disk in parallel, and back in the order of time.

Every block writes three files of packed records (users, events, impressions). Impressions come back
hour after hour: in each block they are sorted by time, so that a span of hours is one range of
bytes. A partition is as many whole hours as hold about `PARTITION` impressions, so memory does not
grow with the world. The order, and so every byte, is the same whatever the number of workers.
"""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
from collections.abc import Iterator

import numpy as np

from rankjax.data.sources import world_process, world_tables
from rankjax.data.sources.world_tables import HOUR, World

PARTITION = 1 << 19
BEFOREHAND = 2  # blocks per worker that may wait for the reader

USERS = np.dtype([(name, np.int16) for name in world_tables.USER])
EVENTS = np.dtype([("user", "i4"), ("time", "i8"), ("item", "i4"), ("action", "i4")])
_SHOWN = [
    *(("request", "i4"), ("user", "i4"), ("time", "i4"), ("item", "i4"), ("position", "i1")),
    *(("surface", "i1"), ("click", "i1"), ("like", "i1")),
    *(("p_click", "f8"), ("p_like", "f8"), ("p_known", "f8")),
]


def impression_dtype(parts: bool) -> np.dtype:
    """A spooled impression; ids are 0-based and count within the block."""
    extra = [(f"part_{name}", "f4") for name in world_process.PARTS] if parts else []
    return np.dtype(_SHOWN + extra)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spooled:
    """A block on disk: files `<number>.users`, `.events`, `.impressions` in the spool folder."""

    number: int
    requests: int  # numbers used, dropped requests included
    per_hour: np.ndarray  # [hours] uint32, impressions


def spool(config: World, number: int, folder: pathlib.Path, parts: bool) -> Spooled:
    """Simulates one block and writes its files; what a worker runs."""
    block = world_process.simulate(config, number, parts=parts)
    kinds = {"users": USERS, "events": EVENTS, "impressions": impression_dtype(parts)}
    columns = {"users": block.users, "events": block.events, "impressions": block.impressions}
    for file, dtype in kinds.items():
        records = np.empty(len(next(iter(columns[file].values()))), dtype)
        for name in dtype.names:
            records[name] = columns[file][name]
        records.tofile(folder / f"{number}.{file}")
    hours = block.impressions["time"] // HOUR
    per_hour = np.bincount(hours, minlength=config.days * 24).astype(np.uint32)
    return Spooled(number=number, requests=block.requests, per_hour=per_hour)


def blocks(config: World, folder: pathlib.Path, *, parts: bool, workers: int) -> Iterator[Spooled]:
    """Spools all blocks and yields them in order; a few blocks ahead of the reader, no more.

    Raises RuntimeError where a worker dies.
    """
    if workers == 1:
        for number in range(config.blocks):
            yield spool(config, number, folder, parts)
        return
    # Spawned, not forked: the caller's threads (JAX has some) do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    waiting: collections.deque[concurrent.futures.Future[Spooled]] = collections.deque()
    try:
        for number in range(config.blocks):
            if len(waiting) >= BEFOREHAND * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(spool, config, number, folder, parts))
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RuntimeError(
            "world: a worker process died. Out of memory? Or a script that calls prepare outside "
            'of `if __name__ == "__main__":`, which workers import again; else use workers=1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def partitions(
    spooled: list[Spooled], folder: pathlib.Path, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields impressions [n] in order of (time, request, position), with their blocks [n] int64.

    Requests are numbered block after block, so that a stable sort by time of the blocks'
    records, each sorted already, is the whole order.
    """
    total = sum((s.per_hour.astype(np.int64) for s in spooled), np.zeros(1, np.int64))
    read = np.zeros(len(spooled), np.int64)  # records of each block that are behind us
    hour, hours = 0, len(total)
    while hour < hours:
        most = np.searchsorted(np.cumsum(total[hour:]), PARTITION, side="right")
        until = hour + max(1, int(most))
        count = np.array([s.per_hour[hour:until].sum(dtype=np.int64) for s in spooled])
        records = [
            np.fromfile(folder / f"{s.number}.impressions", dtype, n, offset=start * dtype.itemsize)
            for s, start, n in zip(spooled, read.tolist(), count.tolist())
            if n
        ]
        read += count
        hour = until
        if records:
            joined, block = np.concatenate(records), np.repeat(np.arange(len(spooled)), count)
            order = np.argsort(joined["time"], kind="stable")
            yield joined[order], block[order]
