"""State, step, loop: one pass over the samples, scoring each batch before learning from it.

The step is one jitted function with donated state. It differentiates with respect to the dense
parameters and the looked-up unique rows, so its cost does not depend on the size of the tables.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from rankjax import checkpoint, embedding, evaluate, loss, models, optim
from rankjax.batch import Batch
from rankjax.data import event_log, loader, samples
from rankjax.schema import Schema


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. `batch` is in valid impressions a step (on average), whatever the samples."""

    batch: int = 512
    seed: int = 0
    order: str = "time"  # or "shuffled"
    optimizer: optim.OptimConfig = optim.OptimConfig()
    tables: embedding.TableConfig = embedding.TableConfig()
    task_weights: tuple[tuple[str, float], ...] = ()  # (task, lambda); 1 where not named
    aux_weights: tuple[tuple[str, float], ...] = ()  # (auxiliary term, lambda at the start)
    checkpoint_seconds: float = 60.0
    log_every: int = 50  # steps


RANDOM = ("dropout", "input_dropout", "stochastic_length")  # fields that only training reads


class NonFiniteLoss(FloatingPointError):
    """Loss or gradient became NaN or Inf; `state` is intact, as it was before `step`."""

    def __init__(self, message: str, step: int, state: "State"):
        super().__init__(message)
        self.step, self.state = step, state


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "ok", "params", "optimizer", "tables", "table_optimizer", "aux_weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """step int32 []; ok bool [] (False: a step was not finite and nothing is updated any more)."""

    step: jax.Array
    ok: jax.Array
    params: Any
    optimizer: Any
    tables: Any
    table_optimizer: Any
    aux_weights: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled for one model on one schema; rates, seeds and budgets are arguments."""

    model: nn.Module
    layout: embedding.Layout
    step: Callable[[State, Batch, dict[str, jax.Array], jax.Array], tuple[State, dict]]
    score: Callable[[Any, Any, Batch], jax.Array]


def build_model(model_config: Any) -> nn.Module:
    """The module whose `config` field has this Config's type."""
    for cls in models.MODELS.values():
        if isinstance(model_config, cls.__dataclass_fields__["config"].type):
            return cls(model_config)
    known = [cls.__dataclass_fields__["config"].type for cls in models.MODELS.values()]
    raise ValueError(f"found a config of type {type(model_config)}, expected one of {known}")


def program(model_config: Any, schema: Schema, config: TrainConfig) -> Program:
    """The jitted step and scorer, shared by trials that differ in rates, seed or budget only."""
    still = dataclasses.replace(config.optimizer, learning_rate=1.0)
    tables = dataclasses.replace(
        config.tables, init_std=1.0, learning_rate=1.0, bias_learning_rate=1.0, scheduled=False
    )
    return _program(model_config, schema, still, tables, config.task_weights)


def rates_of(config: TrainConfig, steps: int) -> Callable[[int], dict[str, np.float32]]:
    """step -> its learning rates: "dense" by the schedule, "tables" and "biases" by theirs."""
    multiplier, tables = optim.multiplier(config.optimizer, steps), config.tables

    def rates(step: int) -> dict[str, np.float32]:
        share = float(multiplier(step))
        sparse = share if tables.scheduled else 1.0
        return {
            "dense": np.float32(config.optimizer.learning_rate * share),
            "tables": np.float32(tables.learning_rate * sparse),
            "biases": np.float32(tables.bias_learning_rate * sparse),
        }

    return rates


@functools.lru_cache(maxsize=16)
def _program(
    model_config: Any,
    schema: Schema,
    optimizer: optim.OptimConfig,
    tables: embedding.TableConfig,
    task_weights: tuple[tuple[str, float], ...],
) -> Program:
    model = build_model(model_config)
    layout = embedding.plan(schema, tables)
    # With random bits, a prediction made before the update needs a forward pass of its own.
    fields = dataclasses.asdict(model_config)
    stochastic = any(fields.get(name) for name in RANDOM)
    step = functools.partial(_step, model, layout, optimizer, tables, task_weights, stochastic)
    score = functools.partial(evaluate.score, model, layout)
    return Program(model, layout, jax.jit(step, donate_argnums=0), jax.jit(score))


def _step(
    model: nn.Module,
    layout: embedding.Layout,
    optimizer: optim.OptimConfig,
    tables: embedding.TableConfig,
    task_weights: tuple[tuple[str, float], ...],
    stochastic: bool,
    state: State,
    batch: Batch,
    rates: dict[str, jax.Array],
    key: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    ids = embedding.deduplicate(layout, batch)
    rows = embedding.gather(state.tables, ids)
    rngs = {"dropout": jax.random.fold_in(key, state.step)}

    def objective(params, rows):
        logits_rck, aux = evaluate.apply(
            model, layout, params, rows, ids, batch, train=True, rngs=rngs
        )
        total, parts = loss.multi_task(
            logits_rck,
            batch.labels,
            batch.weights,
            aux,
            batch.schema,
            task_weights=dict(task_weights),
            aux_weights=state.aux_weights,
        )
        return total, (logits_rck, parts, loss.adapt(state.aux_weights, aux))

    (total, (logits_rck, parts, aux_weights)), (dense_grads, row_grads) = jax.value_and_grad(
        objective, argnums=(0, 1), has_aux=True
    )(state.params, rows)
    if stochastic:
        logits_rck, _ = evaluate.apply(model, layout, state.params, rows, ids, batch)
    norms = {"dense": optax.global_norm(dense_grads), "tables": optax.global_norm(row_grads)}
    finite = jnp.isfinite(total + norms["dense"] + norms["tables"])
    ok = state.ok & finite

    updates, dense_state = optim.transform(optimizer).update(
        dense_grads, state.optimizer, state.params
    )
    params = jax.tree.map(lambda p, u: p - rates["dense"] * u, state.params, updates)
    params, dense_state, aux_weights = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old),
        (params, dense_state, aux_weights),
        (state.params, state.optimizer, state.aux_weights),
    )
    # A zero gradient leaves rows and accumulators as they are, without a copy of the tables.
    row_grads = jax.tree.map(lambda g: jnp.where(ok, g, 0), row_grads)
    table_rates = {"embedding": rates["tables"], "bias": rates["biases"]}
    new_tables, table_state = embedding.update(
        state.tables, state.table_optimizer, ids, row_grads, tables, table_rates
    )
    new = State(
        state.step + ok.astype(jnp.int32),
        ok,
        params,
        dense_state,
        new_tables,
        table_state,
        aux_weights,
    )
    out = {"loss": total, "ok": ok, "logits": logits_rck, "parts": parts, "grad_norm": norms}
    return new, out


def init(model_config: Any, schema: Schema, config: TrainConfig, batch: Batch) -> State:
    """A fresh state; `batch` gives shapes only. Deterministic in config.seed."""
    prog = program(model_config, schema, config)

    @jax.jit
    def make(key: jax.Array, batch: Batch) -> State:
        dense_key, table_key = jax.random.split(key)
        tables = embedding.init(table_key, schema, config.tables)
        ids = embedding.deduplicate(prog.layout, batch)
        features, _ = embedding.features(prog.layout, embedding.gather(tables, ids), ids, batch)
        keys = {"params": dense_key, "dropout": dense_key}
        # With train=True, so that what only training uses has its parameters too.
        (_, aux), variables = prog.model.init_with_output(keys, features, train=True)
        params = nn.unbox(variables)["params"]
        aux_weights = loss.first_weights(aux, dict(config.aux_weights))
        return State(
            jnp.int32(0),
            jnp.bool_(True),
            params,
            optim.transform(config.optimizer).init(params),
            tables,
            embedding.init_optimizer(tables, config.tables),
            {name: jnp.float32(weight) for name, weight in aux_weights.items()},
        )

    return make(jax.random.key(config.seed), batch.without_impression())


def batches(
    log: event_log.EventLog, config: TrainConfig, chosen: samples.Samples
) -> loader.Batches:
    """The batches of one pass; each holds `config.batch` impressions on average."""
    size = loader.batch_samples_for(chosen, config.batch)
    return loader.Batches(log, chosen, batch_samples=size, order=config.order, seed=config.seed)


@dataclasses.dataclass(frozen=True)
class Run:
    """What training leaves: the state, the predictions made before each update, and the times."""

    state: State
    progressive: evaluate.Scored
    steps_now: int  # of this call; fewer than all of them where a run was resumed
    seconds: dict[str, float]  # total, wait (for the loader), first (step, compilation included)


def run(
    log: event_log.EventLog,
    model_config: Any,
    config: TrainConfig,
    train_samples: samples.Samples,
    folder: pathlib.Path | None = None,
    *,
    start_from: State | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Run:
    """Trains once over `train_samples`; with a folder, saves and resumes there.

    Ctrl-C saves and re-raises. A run killed at any moment resumes at its newest checkpoint and ends
    with the same bits as one that was never killed (on CPU).

    Args:
      start_from: go on learning from this trained state (parameters, tables, both optimizers), as
        the next day's data do; steps and schedule begin anew, the state itself stays usable.
      on_step: called with (steps done, steps in all).
    Raises:
      NonFiniteLoss: loss or gradients became NaN or Inf; says at which step and batch.
    """
    epoch = batches(log, config, train_samples)
    if start_from is None:
        state = init(model_config, log.schema, config, epoch[0])
    else:
        state = jax.tree.map(jnp.copy, dataclasses.replace(start_from, step=jnp.int32(0)))
    journal = checkpoint.Journal(folder, len(log.schema.tasks))
    if folder is not None:
        state = journal.resume(state, {"seed": config.seed, "steps": len(epoch)})
    loop = _Loop(program(model_config, log.schema, config), config, epoch, journal, on_step)
    try:
        state = loop.go(state)
    except KeyboardInterrupt:
        loop.flush()
        journal.save(loop.state)
        raise
    finally:
        journal.close()
    progressive = evaluate.Scored.of(journal.scored, len(log.schema.tasks))
    return Run(
        state,
        progressive,
        len(epoch) - loop.first,
        loop.seconds,
    )


class _Loop:
    """The loop's own bookkeeping: the newest state, clocks, and counts of padding."""

    def __init__(self, prog, config, batches, journal, on_step):
        self.prog, self.config, self.batches = prog, config, batches
        self.journal, self.on_step = journal, on_step
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
            args = batch.without_impression(), rates(step), key
            self.state, out = self.prog.step(self.state, *args)
            self.pending.append((step, batch.impression, out))
            if step == first:
                out["loss"].block_until_ready()
                self.seconds["first"] = time.monotonic() - asked
            last = step + 1 == total
            if last or len(self.pending) == self.config.log_every:
                self.flush()
                if last or time.monotonic() - saved > self.config.checkpoint_seconds:
                    self.journal.save(self.state)
                    saved = time.monotonic()
                if self.on_step:
                    self.on_step(step + 1, total)
        self.seconds["total"] = time.monotonic() - self.began
        return self.state

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
            scored = impression, np.asarray(out["logits"])
            losses.append(float(out["loss"]))
            # Fetching waits for the device: a Ctrl-C comes there, and finds the step still pending.
            del self.pending[0]
            self.journal.scored.append(scored)
        self.journal.write(
            {
                "step": step + 1,
                "loss": float(np.mean(losses)),
                **{k: float(v) for k, v in out["parts"].items()},
                **{f"grad_norm/{k}": float(v) for k, v in out["grad_norm"].items()},
                "padding_share": 1 - self.valid / max(self.slots, 1),
                "loader_wait_share": self.seconds["wait"] / max(elapsed, 1e-9),
                "steps_per_second": (step + 1 - self.first) / max(elapsed, 1e-9),
            }
        )
