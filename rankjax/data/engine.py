"""Who does the pieces of a long work: this process, or the workers of a Ray cluster.

A piece leaves files in a folder that all share, and returns a small note; a piece that is done
twice leaves the same files. So a worker that dies costs the pieces that it was at, which others do
again, and no data go through the cluster's memory.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rankjax import memory, ray_cluster
from rankjax import versions as versions_lib

# (what to do with a piece, the pieces) -> what it returned, in the order of the pieces
Engine = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
TRIES = 3  # of a piece whose worker dies
AHEAD = 2  # pieces that wait for each CPU of the cluster


def here(work: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Any]:
    """One piece after the other, in this process."""
    return map(work, pieces)


@contextlib.contextmanager
def on_ray(
    address: str | None, folder: pathlib.Path, files: Sequence[pathlib.Path] = ()
) -> Iterator["Workers"]:
    """The workers of an existing cluster: a piece a CPU.

    address: host:port of the cluster's head; None or "auto" is RAY_ADDRESS, or the cluster of this
      machine.
    folder, files: of file systems that every node must see at the same paths.

    Raises:
      ValueError: Ray is not installed, no cluster is there, a node does not answer, sees not the
        same folder or files, or has other versions.
    """
    with ray_cluster.connected(address) as ray:
        _check_nodes(ray, folder, files)
        yield Workers(ray)


def versions() -> dict[str, str]:
    """What must be the same on all nodes, so that pieces are the same wherever they are done."""
    return versions_lib.of("numpy", "polars", "pyarrow")


def _seen(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The files that a node does not see, and its versions."""
    return [name for name in names if not os.path.exists(name)], versions()


def _check_nodes(ray: Any, folder: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
    """Asks every node whether it sees a file that is made here, the user's files, and the same
    versions; ValueError for the first that does not."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-by-all.{uuid.uuid4().hex}"
    marker.touch()
    names = [str(marker.absolute()), *(str(f.absolute()) for f in files)]
    try:
        for node, said in ray_cluster.answers(ray, ray_cluster.alive(ray), _seen, names):
            _compare(f"node {node}", names, *said, folder)
    finally:
        marker.unlink(missing_ok=True)


def _compare(
    node: str,
    names: Sequence[str],
    missing: Sequence[str],
    found: dict[str, str],
    folder: pathlib.Path,
) -> None:
    if names[0] in missing:
        raise ValueError(
            f"{node}: found no folder {folder}, expected the same one on all nodes (a file system "
            "that they share)"
        )
    if missing:
        raise ValueError(
            f"{node}: found no file {missing[0]}, expected it on all nodes (a file system that "
            "they share, or an object store)"
        )
    if found != (wanted := versions()):
        raise ValueError(f"{node}: found {found}, expected {wanted} as here")


@dataclasses.dataclass
class Workers:
    """An Engine: pieces are tasks of a connected cluster.

    peak_mib: the most memory that a worker has taken so far. Raises what a piece raises, as it
    would here, and ChildProcessError where the workers of a piece died TRIES times.
    """

    ray: Any
    peak_mib: float = 0.0

    def __call__(self, work: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Any]:
        # A worker has one CPU: Polars shall not start a thread for each of the machine's.
        options = {"num_cpus": 1, "max_retries": TRIES - 1}
        options["runtime_env"] = {"env_vars": {"POLARS_MAX_THREADS": "1"}}
        task, shared = self.ray.remote(**options)(_do), self.ray.put(work)
        ahead = max(1, AHEAD * int(self.ray.cluster_resources().get("CPU", 1)))
        waiting: collections.deque = collections.deque()
        left = iter(pieces)
        try:
            while True:
                new = itertools.islice(left, ahead - len(waiting))
                waiting.extend(task.remote(shared, piece) for piece in new)
                if not waiting:
                    return
                result, peak = self._result(waiting.popleft())
                self.peak_mib = max(self.peak_mib, peak)
                yield result
        finally:
            for one in waiting:
                self.ray.cancel(one)

    def _result(self, reference: Any) -> tuple[Any, float]:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            raise ChildProcessError(
                f"found workers that died {TRIES} times at one piece, expected none "
                f"({ray_cluster.line(error)})"
            ) from error


def _do(work: Callable[[Any], Any], piece: Any) -> tuple[Any, float]:
    return work(piece), memory.peak_mib()
