"""Trains a study on a Ray cluster: every missing trial is a task, on whatever node has room for it.

The driver names the trials that can be named so far, and submits those that are not running; as
tasks end, their rows make the next choices. A task holds no state: it claims the trial's folder,
which all nodes share, and goes on from the newest checkpoint there. So a worker that dies costs the
steps since then, whichever node takes the trial next.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from rankjax import checkpoint, ray_cluster
from rankjax.data import event_log
from rankjax.scaling import cores, nodes, study, workers

SAVE = 60  # seconds that tasks have to save when they are stopped
AGAIN = 5.0  # seconds until a trial that another process holds is tried again
DEATHS = 4  # in a row without a new checkpoint; then a trial is given up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What a trial takes of the cluster. It trains on one device, so on a CPU or the first of the
    accelerators that its task is given."""

    # Cores. With 1, and no accelerator, the bits are those of a local study; with more they may
    # differ in rounding.
    cpus: int = 1
    # A part of a GPU lets several small trials share one.
    gpus: float = 0
    # Chips, as a task of Ray can have them (1, 2, 4, ...).
    tpus: int = 0
    # Others by the names that nodes give them, e.g. fast-disk 1.
    custom: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {k: v for k, v in self.custom.items() if v <= 0 or k in ("CPU", "GPU", "TPU")}
        if self.cpus < 1 or not 0 <= self.gpus <= 1 or self.tpus < 0 or wrong:
            raise ValueError(
                f"study: found resources {dataclasses.asdict(self)}, expected cpus of 1 or more, "
                "gpus of 0 .. 1, tpus of 0 or more, and in custom other names, above 0"
            )
        if self.gpus and self.accelerator == "tpu":
            raise ValueError(f"study: found {self}, expected GPUs or TPUs, not both")

    @property
    def accelerator(self) -> str | None:
        """What jax calls it, None = CPUs."""
        if self.tpus or any(name.startswith("TPU") for name in self.custom):
            return "tpu"
        return "cuda" if self.gpus else None

    def needed(self) -> dict[str, float]:
        """By Ray's names, without zeros."""
        plain = {"CPU": self.cpus, "GPU": self.gpus, "TPU": self.tpus}
        return {k: v for k, v in {**plain, **self.custom}.items() if v}


def run(
    asked: study.Study,
    folder: pathlib.Path,
    resources: Resources | None = None,
    *,
    address: str | None = None,
    at_once: int | None = None,
) -> pathlib.Path:
    """Trains what the folder lacks on a running cluster; returns the path of its report.html.

    Ctrl-C saves the running trials; calling `run` again goes on. jax of this process stays on the
    CPU from now on: the accelerators are the tasks'.

    Args:
      folder, and the log: at the same path on every node.
      address: host:port of the cluster's head; default RAY_ADDRESS, or this machine's cluster.
      at_once: trials at a time; default as many as the cluster has room for.

    Raises:
      ValueError: Ray is not installed, no cluster answers, no node has the resources, a node does
        not share the folder, its locks, the log or the versions; or as `workers.run` does.
      workers.Failed: a trial failed, with its traceback, or its worker died again and again.
    """
    resources = Resources() if resources is None else resources
    folder = pathlib.Path(folder).absolute()
    asked = dataclasses.replace(asked, log=str(pathlib.Path(asked.log).absolute()))
    jax.config.update("jax_platforms", "cpu")
    with ray_cluster.connected(address) as ray:
        able = _able(ray_cluster.alive(ray), resources)
        log = workers.begin(asked, folder)
        with nodes.expecting(asked, folder, log) as expected:
            _check(ray, able, expected)
            _Trials(ray, expected, folder, log, resources, at_once).train()
    return workers.finish(asked, folder, log, "rows of tasks that ended are not in the folder")


def check(resources: Resources, address: str | None = None) -> None:
    """Raises ValueError where no cluster answers, or none of its nodes has the resources."""
    with ray_cluster.connected(address) as ray:
        _able(ray_cluster.alive(ray), resources)


def _able(alive: list[dict[str, Any]], resources: Resources) -> list[dict[str, Any]]:
    """Those of the nodes that can hold a trial; ValueError where there is none."""
    needed = resources.needed()
    able = [n for n in alive if all(n["Resources"].get(k, 0) >= v for k, v in needed.items())]
    if not able:
        plain = lambda r: {k: v for k, v in r.items() if ":" not in k and "memory" not in k}
        have = {n["NodeManagerHostname"]: plain(n["Resources"]) for n in alive}
        raise ValueError(f"study: found nodes {have}, expected one with {needed} for a trial")
    return able


def _check(ray: Any, able: list[dict[str, Any]], expected: nodes.Expected) -> None:
    """Asks every node what it finds, before any work; ValueError for the first that complains."""
    environment = _environment(Resources())
    look = nodes.complaint
    for _, said in ray_cluster.answers(ray, able, look, expected, environment=environment):
        if said:
            raise ValueError(f"study: {said}")


def _environment(resources: Resources) -> dict[str, str]:
    """Of a task's process, from its start: what local workers have too."""
    found = {k: os.environ.get(k, v) for k, v in workers.KEEP_MEMORY.items()}
    found["JAX_PLATFORMS"] = f"{resources.accelerator},cpu" if resources.accelerator else "cpu"
    if 0 < resources.gpus < 1:  # jax would take most of the memory of the whole GPU
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * resources.gpus:.3f}"
    return found


class _Trials:
    """The driver's bookkeeping: which trials run, and how their workers fare."""

    def __init__(
        self,
        ray: Any,
        expected: nodes.Expected,
        folder: pathlib.Path,
        log: event_log.EventLog,
        resources: Resources,
        at_once: int | None,
    ):
        self.ray, self.expected, self.folder, self.at_once = ray, expected, folder, at_once
        self.params = study.params_of(expected.study, log)
        pinned = None if resources.accelerator else resources.cpus
        needed = resources.needed()
        task = ray.remote(_task).options(
            name="rankjax trial",
            num_cpus=needed.pop("CPU"),
            num_gpus=needed.pop("GPU", 0),
            resources=needed,
            max_retries=0,  # this driver tries again, as it knows which checkpoints are new
            runtime_env={"env_vars": _environment(resources)},
        )
        self.submit = functools.partial(task.remote, expected, folder, pinned)
        self.running: dict[Any, study.Request] = {}
        self.rows: study.Rows = {}  # of tasks that ended: a folder may show them a minute later
        self.later: dict[str, float] = {}  # trial -> when it may be tried again
        self.deaths: dict[str, tuple[int | None, int]] = {}  # trial -> (newest checkpoint, deaths)

    def train(self) -> None:
        """Until every row is there. Whatever ends it sooner, the running trials save first."""
        with workers.progress() as bars:
            bar = bars.add_task("trials", total=None)
            try:
                while True:
                    rows = {**study.load_rows(self.folder)[0], **self.rows}
                    todo, known, complete = study.left(self.expected.study, rows, self.params)
                    if not todo and not self.running and complete:
                        break
                    nodes.lead(self.expected)
                    self._start(todo)
                    text = f"trials ({len(self.running)} with the cluster)"
                    bars.update(bar, completed=known - len(todo), total=known, description=text)
                    self._gather(bars)
            except BaseException:
                self._stop()
                raise
        nodes.wait_for_rows(self.expected.study, self.folder, self.params)

    def _start(self, todo: dict[str, study.Request]) -> None:
        busy = {r.trial.id for r in self.running.values()}
        for name, request in todo.items():
            if self.at_once is not None and len(self.running) >= self.at_once:
                return
            if name not in busy and self.later.get(name, 0.0) <= time.monotonic():
                self.running[self.submit(request)] = request

    def _gather(self, bars: Any) -> None:
        """Waits for the next task that ends, and takes in what it says."""
        if not self.running:
            time.sleep(AGAIN / 5)
            return
        ended, _ = self.ray.wait(list(self.running), timeout=AGAIN)
        for ref in ended:
            request = self.running.pop(ref)
            name, errors = request.trial.id, self.ray.exceptions
            try:
                kind, said = self.ray.get(ref)
            except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as e:
                workers.say(bars, self._died(name, e))
                continue
            except errors.RayError as error:
                raise workers.Failed(f"trial {name}: {error}") from error
            if kind == "failed":
                raise workers.Failed(f"trial {name} failed on {said}")
            if kind == "trained":
                self.rows[name] = said
            else:
                self.later[name] = time.monotonic() + AGAIN

    def _died(self, name: str, error: Exception) -> str:
        """Counts; Failed where the trial's workers die without getting on."""
        newest = checkpoint.latest(self.folder / "trials" / name / "checkpoints")
        before, count = self.deaths.get(name, (None, 0))
        count = count + 1 if newest == before else 1
        self.deaths[name] = newest, count
        where = "its start" if newest is None else f"step {newest}"
        why = ray_cluster.line(error)
        if count >= DEATHS:
            raise workers.Failed(
                f"trial {name}: its worker died {count} times at {where}, expected a new "
                f"checkpoint between; is the memory of a node too small? {why}"
            )
        return f"trial {name}: its worker died, it goes on from {where} ({why[:200]})"

    def _stop(self) -> None:
        """Ends the running tasks by a KeyboardInterrupt, at which they save."""
        for ref in self.running:
            self.ray.cancel(ref)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=SAVE)


def _task(
    expected: nodes.Expected, folder: pathlib.Path, pinned: int | None, request: study.Request
) -> tuple[str, Any]:
    """In a process of Ray: ("trained", row), ("taken", "") where another process has the trial, or
    ("failed", node and reason). Errors are told, not raised, so that their text comes whole."""
    me = os.uname().nodename
    try:
        log, params = _joined(expected, folder, pinned)
        study.attempt(expected.study, folder, request, log, params)
        path = folder / "trials" / request.trial.id / "result.json"
        row = json.loads(path.read_text())["result"] if path.exists() else None
        if row is None or study.missing(request, {request.trial.id: row}):
            return "taken", ""
        return "trained", row
    except nodes.Differs as error:
        return "failed", str(error)
    except Exception:
        return "failed", f"{me}:\n{traceback.format_exc()}"


@functools.lru_cache(maxsize=1)
def _joined(
    expected: nodes.Expected, folder: pathlib.Path, pinned: int | None
) -> tuple[event_log.EventLog, Callable[[Any], int]]:
    """Once a process, which then trains one trial after the other: its cores, and the log. Nodes
    that came after the start are checked here."""
    if pinned is not None:
        cores.pin(pinned)
    nodes.check(expected)
    log = study.open_folder(expected.study, folder)
    return log, study.params_of(expected.study, log)
