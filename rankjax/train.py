"""The loop: one pass over the samples, scoring each batch before learning from it.

On one device, or on a mesh of devices of one or many hosts: then every host runs the loop with its
own rows of each batch, and all of them save, stop and fail together.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import checkpoint, embedding, evaluate, hosts, sharding
from rankjax.batch import Batch
from rankjax.data import event_log, loader, samples
from rankjax.layers import stack
from rankjax.step import Program, State, TrainConfig, build_model, init, program, rates_of

__all__ = [
    "NonFiniteLoss",
    "Program",
    "Run",
    "State",
    "TrainConfig",
    "batches",
    "build_model",
    "init",
    "program",
    "rates_of",
    "run",
]


MEET = 10.0  # seconds


class NonFiniteLoss(FloatingPointError):
    """Loss or gradient became NaN or Inf; `state` is intact, as it was before `step`."""

    def __init__(self, message: str, step: int, state: "State"):
        super().__init__(message)
        self.step, self.state = step, state


def batches(
    log: event_log.EventLog,
    config: TrainConfig,
    chosen: samples.Samples,
    place: sharding.Placement | None = None,
) -> loader.Batches:
    """The batches of one pass; each holds `config.batch` impressions on average.

    Of a mesh, this host's rows of them; which samples a step holds is the same on every mesh.
    """
    size = loader.batch_samples_for(chosen, config.batch)
    shares = {}
    if place is not None:
        process, count = place.hosts
        shares = {"shares": place.mesh.size, "process_index": process, "process_count": count}
    return loader.Batches(
        log, chosen, batch_samples=size, order=config.order, seed=config.seed, **shares
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What training leaves: the state, the predictions made before each update, and the times."""

    state: State
    progressive: evaluate.Scored
    steps_now: int  # of this call; fewer than all of them where a run was resumed
    seconds: dict[str, float]  # total, wait (for the loader), first (step, compilation included)
    # Of a mesh: what the last step exchanged of tables: rounds, and bytes that a device sent.
    exchanged: dict[str, float] = dataclasses.field(default_factory=dict)


def run(
    log: event_log.EventLog,
    model_config: Any,
    config: TrainConfig,
    train_samples: samples.Samples,
    folder: pathlib.Path | None = None,
    *,
    start_from: State | None = None,
    on_step: Callable[[int, int], None] | None = None,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> Run:
    """Trains once over `train_samples`; with a folder, saves and resumes there.

    Ctrl-C and SIGTERM save and raise KeyboardInterrupt. A run killed at any moment resumes at its
    newest checkpoint and ends with the same bits as one that was never killed (on CPU). On a mesh
    it may resume on another mesh, and on another number of hosts; then the same up to rounding.

    Args:
      folder: which all hosts share; needed where there are several.
      start_from: go on learning from this trained state (parameters, tables, both optimizers), as
        the next day's data do; steps and schedule begin anew, the state itself stays usable.
      on_step: called with (steps done, steps in all).
      place: a mesh (`sharding.placement`), of all devices of all hosts; None = one device.
      compute: how the stack of layers is computed: scanned, recomputed. A run stays with one way,
        since scanned layers' parameters are stacked.
    Raises:
      NonFiniteLoss: loss or gradients became NaN or Inf; says at which step and batch.
      hosts.HostError: the hosts' logs, settings or clocks differ.
    """
    if not hosts.alone() and (folder is None or place is None):
        raise ValueError(
            f"train.run: folder={folder}, place={place} on one of several hosts, expected a folder "
            "that they share and a mesh of all of their devices"
        )
    with hosts.watched(folder, (NonFiniteLoss,)) as watch, hosts.Stop().listening() as stop:
        epoch = batches(log, config, train_samples, place)
        _check_same(log, place, compute, model=model_config, training=config, steps=len(epoch))
        hosts.check_same({"goes on from a state": start_from is not None})
        if start_from is None:
            state = init(model_config, log.schema, config, epoch[0], place, compute)
        else:
            begin = jnp.zeros_like(start_from.step)
            state = jax.tree.map(jnp.copy, dataclasses.replace(start_from, step=begin))
        journal = checkpoint.Journal(folder, len(log.schema.tasks))
        if folder is not None:
            rows = dict(embedding.plan(log.schema, config.tables).arrays)
            how = {"scan": compute.scan}  # which decides the names of parameters
            if config.tables.pack > 1:
                how["pack"] = config.tables.pack
            meta = {"seed": config.seed, "steps": len(epoch), "rows": rows, **how}
            state = journal.resume(state, meta)
        prog = program(model_config, log.schema, config, place, compute)
        loop = _Loop(prog, config, epoch, journal, on_step, place, watch, stop)
        try:
            state = loop.go(state)
        except KeyboardInterrupt:
            if hosts.alone():  # of many, one cannot save by itself
                loop.flush()
                journal.save(loop.state)
            raise
        finally:
            journal.close()
        progressive = evaluate.joined(journal.scored, len(log.schema.tasks), journal.steps)
    steps = len(epoch) - loop.first
    return Run(state, progressive, steps, loop.seconds, loop.exchanged)


def _check_same(
    log: event_log.EventLog, place: sharding.Placement | None, compute: stack.Compute, **more: Any
) -> None:
    """Of what hosts compute with: see `hosts.check_same`."""
    mesh = None if place is None else {**place.mesh.shape, "strategy": place.strategy}
    hosts.check_same({"log": log.fingerprint, "mesh": mesh, "compute": compute, **more})


class _Loop:
    """The loop's own bookkeeping: the newest state, clocks, and counts of padding."""

    def __init__(self, prog, config, batches, journal, on_step, place, watch, stop):
        self.prog, self.config, self.batches = prog, config, batches
        self.journal, self.on_step, self.place = journal, on_step, place
        self.watch, self.stop = watch, stop
        self.exchanged: dict[str, float] = {}
        self.every = config.log_every  # steps until what was computed is fetched
        self.state: State | None = None
        self.pending: list[tuple[int, np.ndarray, dict]] = []  # steps not yet fetched
        self.began, self.first = 0.0, 0
        self.valid = self.slots = 0
        self.seconds = {"total": 0.0, "wait": 0.0, "first": 0.0}

    def go(self, state: State) -> State:
        total = len(self.batches)
        first = int(state.step)
        rates = rates_of(self.config, total)
        key = jax.random.key(self.config.seed)
        self.began = saved = time.monotonic()
        self.state, self.first = state, first
        stream = iter(loader.stream(self.batches, start=first))
        for step in range(first, total):
            asked = time.monotonic()
            _, batch = next(stream)
            self.seconds["wait"] += time.monotonic() - asked
            self._count(batch)
            args = self._placed(batch), rates(step), key
            self.state, out = self.prog.step(self.state, *args)
            self.pending.append((step, batch.impression, out))
            if step == first:
                out["loss"].block_until_ready()
                self.seconds["first"] = time.monotonic() - asked
            last = step + 1 == total
            if last or len(self.pending) == self.every:
                self.flush()
                due = time.monotonic() - saved > self.config.checkpoint_seconds
                due, stop = hosts.any_of(due or last, self.stop.wished)
                if due or stop:
                    self.journal.save(self.state)
                    saved = time.monotonic()
                if self.watch:
                    self.watch.at(step + 1)
                if self.on_step:
                    self.on_step(step + 1, total)
                self._meet_in_time(step)
                if stop:
                    raise KeyboardInterrupt(f"asked to stop; saved after step {step + 1}")
        self.seconds["total"] = time.monotonic() - self.began
        return self.state

    def _meet_in_time(self, step: int) -> None:
        """Of many hosts: they agree whether to stop every ten seconds at least, however slow."""
        if hosts.alone():
            return
        spent = time.monotonic() - self.began - self.seconds["first"]
        of_all = hosts.gathered(np.asarray([spent / max(1, step - self.first)]))
        slowest = float(max(x[0] for x in of_all))
        self.every = max(1, min(self.config.log_every, int(MEET / max(slowest, 1e-9))))

    def _placed(self, batch: Batch) -> Batch:
        batch = batch.without_impression()
        return batch if self.place is None else self.place.put(batch)

    def _count(self, batch: Batch) -> None:
        for sample in (batch.history_sample, batch.candidate_sample):
            self.valid += int(np.count_nonzero(sample >= 0))
            self.slots += sample.size

    def flush(self) -> None:
        """Fetches what the last steps computed, checks it, and writes a line of metrics."""
        if not self.pending:
            return
        elapsed = time.monotonic() - self.began
        losses = []
        while self.pending:
            step, impression, out = self.pending[0]
            if not bool(out["ok"]):
                self.journal.save(self.state)
                raise NonFiniteLoss(
                    f"step {step} (batch {step} of seed {self.config.seed}, first impression in "
                    f"row {impression.max(initial=-1, where=impression >= 0)} of the log): loss "
                    f"{float(out['loss'])}, gradient norms "
                    f"{ {k: float(v) for k, v in out['grad_norm'].items()} }; expected finite "
                    "numbers. The state before this step is kept.",
                    step,
                    self.state,
                )
            scored = impression, sharding.local(out["logits"])
            losses.append(float(out["loss"]))
            # Fetching waits for the device: a Ctrl-C comes there, and finds the step still pending.
            del self.pending[0]
            self.journal.add(step, *scored)
        self.exchanged = {k: float(v) for k, v in out.get("exchange", {}).items()}
        self.journal.write(
            {
                "step": step + 1,
                "loss": float(np.mean(losses)),
                **{k: float(v) for k, v in out["parts"].items()},
                **{f"grad_norm/{k}": float(v) for k, v in out["grad_norm"].items()},
                **{f"exchange/{k}": v for k, v in self.exchanged.items()},
                "padding_share": 1 - self.valid / max(self.slots, 1),
                "loader_wait_share": self.seconds["wait"] / max(elapsed, 1e-9),
                "steps_per_second": (step + 1 - self.first) / max(elapsed, 1e-9),
            }
        )
