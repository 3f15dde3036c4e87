"""Many processes ("hosts") that train as one: joining, agreeing, and saying which of them failed.

Every process runs the same program; JAX's coordination service (in process 0) knows them all. What
they must have in common is compared before anything is computed, decisions that a clock or a signal
takes are taken for all at once, and a process beside each host stays behind when that one ends
badly, to say which host ended first.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

CLOCK = 30.0  # seconds by which clocks may differ
CHUNK = 2**24  # bytes of each host that are gathered at a time
HEARTBEAT = 60  # seconds without a sign after which JAX gives up a host
GRACE = 3.0  # seconds in which the other hosts' ends are noted too
WATCHER = pathlib.Path(__file__).with_name("host_watcher.py")


class HostError(RuntimeError):
    """Hosts cannot train together; names the host and the cause."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How this process finds the others; nothing given = it is alone.

    auto: by the environment (Cloud TPU, SLURM, Open MPI, Kubernetes), as
      `jax.distributed.initialize` finds it. Or else all of coordinator ("address:port" of process
      0), count (processes) and index (of this one).
    timeout: seconds to wait for the others to come.
    """

    auto: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    timeout: int = 300


def join(config: HostConfig) -> None:
    """Joins the others; before anything else of JAX is used. Nothing to do for a lone process.

    Raises HostError, naming this host, for an incomplete configuration, a port of the coordinator
    that is taken, and a coordinator that cannot be reached in time.
    """
    explicit = {name: getattr(config, name) for name in ("coordinator", "count", "index")}
    if config.auto:
        try:
            jax.distributed.initialize(
                initialization_timeout=config.timeout, heartbeat_timeout_seconds=HEARTBEAT
            )
        except (RuntimeError, ValueError) as error:
            raise HostError(
                f"hosts: {socket.gethostname()} cannot join by its environment ({error}); expected "
                "Cloud TPU, SLURM, Open MPI or Kubernetes, or join.coordinator, count and index"
            ) from error
        return
    given = [name for name, value in explicit.items() if value is not None]
    if not given:
        return
    if len(given) < len(explicit):
        raise HostError(f"hosts: found {explicit}, expected all of them, or none, or auto")
    if not 0 <= config.index < config.count:
        raise HostError(f"hosts: index={config.index}, expected 0 .. {config.count - 1}")
    _meet(config)
    jax.distributed.initialize(
        config.coordinator,
        config.count,
        config.index,
        initialization_timeout=config.timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
    )


def _meet(config: HostConfig) -> None:
    """What XLA would end the process for, as an error: the port is taken, nobody listens there."""
    me = f"host {config.index} of {config.count} ({socket.gethostname()})"
    address, _, port = config.coordinator.rpartition(":")
    if not address or not port.isdigit():
        raise HostError(
            f"{me}: coordinator {config.coordinator!r}, expected address:port of host 0"
        )
    if config.index == 0:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
        except OSError as error:
            raise HostError(
                f"{me}: cannot serve the others at {config.coordinator} ({error}); expected a "
                "free port, the same for all hosts"
            ) from error
        return
    end = time.monotonic() + config.timeout
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise HostError(
                    f"{me}: host 0 does not answer at {config.coordinator} after "
                    f"{config.timeout} s ({error}); is it started, and is the port open?"
                ) from error
            time.sleep(0.2)


def alone() -> bool:
    return jax.process_count() == 1


def name(index: int, machine: str | None = None) -> str:
    """As every message here says it: host 1 of 4 (machine)."""
    where = f" ({machine})" if machine else ""
    return f"host {index} of {jax.process_count()}{where}"


def me() -> str:
    """As "host 1 of 4 (machine): ", before what this one has to say; "" for a lone process."""
    if not jax.distributed.is_initialized():
        return ""
    return f"{name(jax.process_index(), socket.gethostname())}: "


def wait(what: str) -> None:
    """Until all hosts are here."""
    if not alone():
        multihost_utils.sync_global_devices(what)


def first_does(function: Callable[[], None]) -> None:
    """Host 0 does it while the others wait; where it fails, all of them raise."""
    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            function()
        except Exception as error:
            failed = error
    if not alone():
        said = "" if failed is None else f"{type(failed).__name__}: {failed}"
        told = gathered(np.frombuffer(said.encode(), np.uint8))[0].tobytes().decode()
        if told and failed is None:
            raise HostError(f"{name(0)}: {told}")
    if failed is not None:
        raise failed


def gathered(x: np.ndarray) -> list[np.ndarray]:
    """Of every host its array; shapes may differ along the first axis. By all hosts together."""
    if alone():
        return [x]
    # As bytes: JAX would halve 64-bit integers. In pieces, as it goes through the devices' memory.
    mine = np.frombuffer(x.tobytes(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(mine) >> 20, len(mine) % 2**20]))
    sizes = [int(whole) * 2**20 + int(rest) for whole, rest in np.reshape(sizes, (-1, 2))]
    parts: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, max(sizes), CHUNK):
        piece = np.zeros(min(CHUNK, max(sizes) - start), np.uint8)
        own = mine[start : start + len(piece)]
        piece[: len(own)] = own
        everyone = np.asarray(multihost_utils.process_allgather(piece)).reshape(len(sizes), -1)
        for part, got, size in zip(parts, everyone, sizes):
            part.append(got[: max(0, size - start)].tobytes())
    return [np.frombuffer(b"".join(p), x.dtype).reshape(-1, *x.shape[1:]) for p in parts]


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Every flag, true where it is true on some host. By all hosts together."""
    if alone():
        return flags
    found = multihost_utils.process_allgather(np.asarray(flags, np.int32))
    return tuple(bool(x) for x in np.asarray(found).reshape(-1, len(flags)).max(axis=0))


def check_same(facts: dict[str, Any]) -> None:
    """Raises HostError where a host's facts (JSON) or clock differ from those of host 0.

    By all hosts together; all of them raise, and name the same host.
    """
    if alone():
        return
    wait("clocks")  # so that all read them at about the same time
    mine = {"machine": socket.gethostname(), "time": time.time(), "facts": facts}
    mine = json.loads(json.dumps(mine, default=str))
    told = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    everyone = [json.loads(x.tobytes()) for x in gathered(told)]
    first = everyone[0]
    zero = name(0, first["machine"])
    for index, other in enumerate(everyone[1:], 1):
        who = name(index, other["machine"])
        for key, want in first["facts"].items():
            if (found := other["facts"].get(key)) != want:
                raise HostError(f"{who}: found {key} {found}, expected {want} as on {zero}")
        off = other["time"] - first["time"]
        if abs(off) > CLOCK:
            raise HostError(
                f"{who}: its clock is {off:+.0f} s from that of {zero}; expected within "
                f"{CLOCK:.0f} s, so that what hosts write can be put in order"
            )


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Around a command: of several hosts, one that fails ends at once.

    JAX would have it wait for the others at its exit, and they wait for it in a step.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code in (None, 0) or not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


class Stop:
    """Ctrl-C and SIGTERM (a preemption) as a wish, which all hosts then fulfil at the same step.

    A second signal ends this host at once.
    """

    def __init__(self) -> None:
        self.wished = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Alone, Ctrl-C does what it always does, and SIGTERM the same: who is inside saves."""
        handlers: dict[int, Any] = {}
        if not alone():
            handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._wish)
        # What others have set (a scheduler's library) stays; a thread cannot set anything.
        elif _in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            handlers = {signal.SIGTERM: signal.default_int_handler}
        before = {which: signal.signal(which, handler) for which, handler in handlers.items()}
        try:
            yield self
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def _wish(self, *_: Any) -> None:
        if self.wished:
            raise KeyboardInterrupt("asked to stop a second time")
        self.wished = True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Watch:
    """A small process beside this host, which outlives it and tells who ended first.

    XLA ends a process that lost another one, without Python, and only after a while. The watcher
    notices at once that its host is gone, notes when, and prints which host ended first, its last
    step, and the newest complete checkpoint; watchers of the others end their hosts then. Notes are
    files in `folder/hosts`, which all hosts share. By all hosts together.

    Raises HostError where they do not share the folder.
    """

    def __init__(self, folder: pathlib.Path):
        run = gathered(np.frombuffer(os.urandom(8), np.uint8))[0].tobytes().hex()
        _check_shared(pathlib.Path(folder), run)
        me = {
            "run": run,
            "index": jax.process_index(),
            "count": jax.process_count(),
            "machine": socket.gethostname(),
            "pid": os.getpid(),
        }
        # Isolated (-I): it imports the standard library only, and starts at once.
        args = WATCHER, folder, json.dumps(me), GRACE
        self.process = subprocess.Popen(
            [sys.executable, "-I", *map(str, args)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is not meant for it
        )

    def at(self, step: int) -> None:
        """This host has come to a step."""
        self._tell(f"step {step}\n")

    def end(self, error: BaseException | None = None) -> None:
        """This host ends in an orderly way, well or with an error that it has told itself."""
        said = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        self._tell("done\n" if error is None else f"error {said}\n")
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the watcher may be gone; the host goes on
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()


def _check_shared(folder: pathlib.Path, run: str) -> None:
    """Raises HostError, on all hosts, where one does not see what host 0 writes into the folder."""
    first_does(lambda: _note_run(folder, run))
    try:
        seen = (folder / "hosts" / "run").read_text() == run
    except OSError:
        seen = False
    blind = [i for i, x in enumerate(gathered(np.asarray([seen]))) if not x[0]]
    if blind:
        raise HostError(
            f"{name(blind[0])}: sees another {folder} than host 0; expected a folder on a file "
            "system that all hosts share"
        )


def _note_run(folder: pathlib.Path, run: str) -> None:
    notes = folder / "hosts"
    notes.mkdir(parents=True, exist_ok=True)
    for old in notes.glob("*.json"):
        old.unlink()
    (notes / "run").write_text(run)


@contextlib.contextmanager
def watched(
    folder: pathlib.Path | None, outcomes: tuple[type[Exception], ...] = ()
) -> Iterator[Watch | None]:
    """A Watch over what happens inside; None where this process is alone.

    outcomes: errors that end all hosts alike, and that they tell themselves.
    """
    if folder is None or alone():
        yield None
        return
    watch = Watch(folder)
    try:
        yield watch
    except outcomes:
        watch.end()
        raise
    except BaseException as error:
        watch.end(error)
        raise
    watch.end()
