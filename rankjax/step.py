"""State and one step: what is jitted, on one device or on a mesh.

The step donates its state. It differentiates with respect to the dense parameters and the looked-up
unique rows, so its cost does not depend on the size of the tables.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from rankjax import embedding, evaluate, loss, models, optim, sharded_embedding, sharding
from rankjax.batch import Batch
from rankjax.layers import stack
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
    lib: Any  # the module `embedding`, or what stands in its place on a mesh
    layout: embedding.Layout
    step: Callable[[State, Batch, dict[str, jax.Array], jax.Array], tuple[State, dict]]
    score: Callable[[Any, Any, Batch], jax.Array]


def build_model(model_config: Any, compute: stack.Compute = stack.PLAIN) -> nn.Module:
    """The module whose `config` field has this Config's type."""
    how = {} if compute == stack.PLAIN else {"compute": compute}  # not every model has a stack
    for cls in models.MODELS.values():
        if isinstance(model_config, cls.__dataclass_fields__["config"].type):
            return cls(model_config, **how)
    known = [cls.__dataclass_fields__["config"].type for cls in models.MODELS.values()]
    raise ValueError(f"found a config of type {type(model_config)}, expected one of {known}")


def program(
    model_config: Any,
    schema: Schema,
    config: TrainConfig,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> Program:
    """The jitted step and scorer, shared by trials that differ in rates, seed or budget only.

    place: on a mesh, None = on one device. The rows of a batch must be a multiple of the devices.
    Raises ValueError for tables with `clip` on a mesh.
    compute: how the model's stack of layers is computed; the parameters of scanned layers are
    stacked (layers/stack.py).
    """
    if place is not None and config.tables.clip is not None:
        raise ValueError(
            f"step: tables.clip={config.tables.clip} on a mesh, expected None: the norm of a row's "
            "gradient is known after the exchange only"
        )
    still = dataclasses.replace(config.optimizer, learning_rate=1.0)
    tables = dataclasses.replace(
        config.tables, init_std=1.0, learning_rate=1.0, bias_learning_rate=1.0, scheduled=False
    )
    return _program(model_config, schema, still, tables, config.task_weights, place, compute)


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
    place: sharding.Placement | None,
    compute: stack.Compute,
) -> Program:
    model = build_model(model_config, compute)
    lib = embedding if place is None else sharded_embedding.Sharded(place)
    layout = lib.plan(schema, tables)
    # With random bits, a prediction made before the update needs a forward pass of its own.
    fields = dataclasses.asdict(model_config)
    stochastic = any(fields.get(name) for name in RANDOM)
    static = (model, lib, layout, optimizer, tables, task_weights, stochastic, place)
    step = functools.partial(_step, *static)
    score = functools.partial(evaluate.score, model, layout, lib=lib)
    # As the batch came in: every host reads the predictions of its own rows.
    score = jax.jit(score, out_shardings=None if place is None else place.rows)
    return Program(model, lib, layout, jax.jit(step, donate_argnums=0), score)


def _step(
    model: nn.Module,
    lib: Any,
    layout: embedding.Layout,
    optimizer: optim.OptimConfig,
    tables: embedding.TableConfig,
    task_weights: tuple[tuple[str, float], ...],
    stochastic: bool,
    place: sharding.Placement | None,
    state: State,
    batch: Batch,
    rates: dict[str, jax.Array],
    key: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    ids = lib.deduplicate(layout, batch)
    if place is None:
        rows = lib.gather(state.tables, ids)
    else:
        rows, fetched = lib.fetch(state.tables, ids)
    rngs = {"dropout": jax.random.fold_in(key, state.step)}

    def objective(params, rows):
        logits_rck, aux = evaluate.apply(
            model, layout, params, rows, ids, batch, train=True, rngs=rngs, lib=lib
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
        logits_rck, _ = evaluate.apply(model, layout, state.params, rows, ids, batch, lib=lib)
    # On a mesh the gradients of a row that several devices hold count apart.
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
    update = state.tables, state.table_optimizer, ids, row_grads, tables, table_rates
    if place is None:
        new_tables, table_state = lib.update(*update)
    else:
        new_tables, table_state, sent = lib.send(*update)
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
    if place is not None:
        new = jax.lax.with_sharding_constraint(new, shardings(new, place))
        # As the batch came in: every host reads the predictions of its own rows.
        out["logits"] = jax.lax.with_sharding_constraint(logits_rck, place.rows)
        out["exchange"] = lib.exchanged(state.tables, ids, fetched, sent)
    return new, out


def init(
    model_config: Any,
    schema: Schema,
    config: TrainConfig,
    batch: Batch,
    place: sharding.Placement | None = None,
    compute: stack.Compute = stack.PLAIN,
) -> State:
    """A fresh state; `batch` gives shapes only. Deterministic in config.seed.

    On a mesh every device makes its own part, and no host ever holds a whole table; every host
    gives its own rows of a batch. Scanned layers start as they would one by one.
    """
    batch = batch.without_impression()
    make = functools.partial(fresh, model_config, schema, config, place, compute)
    args = jax.random.key(config.seed), batch if place is None else place.put(batch)
    own = None if place is None else shardings(jax.eval_shape(make, *args), place)
    return jax.jit(make, out_shardings=own)(*args)


def fresh(
    model_config: Any,
    schema: Schema,
    config: TrainConfig,
    place: sharding.Placement | None,
    compute: stack.Compute,
    key: jax.Array,
    batch: Batch,
) -> State:
    """What `init` jits: the state from a random key; `batch` gives shapes only."""
    prog = program(model_config, schema, config, place, compute)
    one_by_one = build_model(model_config)
    dense_key, table_key = jax.random.split(key)
    tables = prog.lib.init(table_key, schema, config.tables, prog.layout)
    ids = prog.lib.deduplicate(prog.layout, batch)
    rows = prog.lib.gather(tables, ids)
    features, _ = prog.lib.features(prog.layout, rows, ids, batch)
    keys = {"params": dense_key, "dropout": dense_key}
    # With train=True, so that what only training uses has its parameters too.
    with sharding.on(place):
        (_, aux), variables = one_by_one.init_with_output(keys, features, train=True)
    params = nn.unbox(variables)["params"]
    if compute.scan:
        own = jax.eval_shape(lambda: prog.model.init(keys, features, train=True)["params"])
        params = stack.stacked(params, own)
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


def shardings(state: State, place: sharding.Placement) -> State:
    """A NamedSharding for every array of a state (arrays or shapes)."""
    whole = lambda tree: jax.tree.map(lambda _: place.whole, tree)
    rows = lambda tree: jax.tree.map(lambda _: place.rows, tree)
    return State(
        place.whole,
        place.whole,
        place.parameters(state.params),
        place.beside_parameters(state.optimizer, state.params),
        rows(state.tables),
        rows(state.table_optimizer),
        whole(state.aux_weights),
    )
