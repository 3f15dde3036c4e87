"""Embedding tables outside Flax: lookup of the batch's rows, row-sparse row-wise Adagrad.

    layout = plan(schema, config)                  static: which table lies where
    tables = init(key, schema, config)             state = init_optimizer(tables, config)
    ids = deduplicate(layout, batch)               the distinct rows of the batch
    rows = gather(tables, ids)                     what the step differentiates with respect to
    features(layout, rows, ids, batch)             -> Features, bias_logits
    update(tables, state, ids, row_gradients, config)

A step reads and writes the rows that the batch names and no others, so that its cost depends on
the number of ids and not on the size of the tables. Tables share physical arrays: one lookup and
one update an array, whatever the number of features.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import distinct, lines
from rankjax.batch import Batch, Features
from rankjax.schema import Feature, Schema

# Tables share an array below this many rows: few arrays keep compile and run time down, and a
# large table on its own can be sharded by itself.
FUSED_ROWS = 2**22
# An array with at most this many rows per id of the batch is taken whole: reading and writing
# all of it in order is then cheaper than finding the distinct ids (measured on XLA:CPU).
WHOLE_ROWS_PER_ID = 0.75
METHODS = ("whole", "hash", "sort")
place: None = None  # all on one device; `sharded_embedding.Sharded` has a mesh here
Method = Literal["whole", "hash", "sort"]

Tables = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Width, initialisation and row-wise Adagrad of all tables.

    The rule for a row with gradient g [E]: acc += mean(g^2); row -= rate * g / (sqrt(acc) + eps),
    one float32 accumulator a row. The K biases of an id have an accumulator of their own.

    pack: rows that stand side by side in memory (lines.py); 128 / width lets a TPU look up large
      tables as they lie. Results are the same bits.
    scheduled: the rates follow the dense schedule too. Off, because Adagrad slows a row down by
      the updates that this row has had, and a rate that falls with time starves the rows of items
      that appear late in a pass over time.
    """

    width: int = 16  # E
    init_std: float = 0.05
    learning_rate: float = 0.1
    bias_learning_rate: float = 0.1
    eps: float = 1e-8
    initial_accumulator: float = 0.0
    clip: float | None = None  # global norm of all row gradients of a step; None = off
    biases: bool = True  # K scalar biases per id, which start at 0
    scheduled: bool = False
    pack: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "pack"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"embedding.TableConfig: {name}={value}, expected >= 1")
        if not self.eps > 0:
            # acc = 0 with g = 0 would give 0 / 0.
            raise ValueError(f"embedding.TableConfig: eps={self.eps}, expected > 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"embedding.TableConfig: clip={self.clip}, expected > 0 or None")
        for name in ("init_std", "learning_rate", "bias_learning_rate", "initial_accumulator"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"embedding.TableConfig: {name}={value}, expected a finite number >= 0"
                )


@dataclasses.dataclass(frozen=True)
class Place:
    """Id i > 0 of a table is row i + offset of a physical array; id 0 is row 0 of it."""

    array: str
    offset: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which table lies where; static and hashable. arrays: (name, rows), row 0 included."""

    schema: Schema
    config: TableConfig
    arrays: tuple[tuple[str, int], ...]
    places: tuple[tuple[str, Place], ...]

    def place(self, table: str) -> Place:
        return dict(self.places)[table]

    def slots(self, array: str) -> tuple[tuple[str, Feature], ...]:
        """(part of the batch, feature) of everything that reads this array, in a fixed order."""
        s = self.schema
        parts = (("user", s.user), ("history", s.history), ("candidate", s.candidate))
        return tuple(
            (part, f)
            for part, features_ in parts
            for f in features_
            if f.table and self.place(f.table).array == array
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """The distinct rows of a batch, and where each id finds its own.

    unique: {array: int32 [U]}, position 0 is row 0, unused positions hold the array's row count
      (out of range: reads are clamped, writes dropped); None = all rows in order.
    inverse: {array: (int32, shape of the batch's ids, one per slot of the layout)}, positions.
    """

    unique: dict[str, jax.Array | None]
    inverse: dict[str, tuple[jax.Array, ...]]
    pack: int = dataclasses.field(default=1, metadata={"static": True})  # of the tables


def plan(schema: Schema, config: TableConfig) -> Layout:
    """Places the schema's tables: those below FUSED_ROWS together, each other one by itself. Arrays
    are filled up to whole lines."""
    arrays: dict[str, int] = {}
    places = []
    fused = ""  # the array that is being filled
    for t in schema.tables:
        if t.rows >= FUSED_ROWS:
            arrays[t.name] = t.rows
            places.append((t.name, Place(t.name, 0)))
            continue
        if not fused or arrays[fused] + t.rows - 1 >= FUSED_ROWS:
            fused = t.name  # named after its first table, so that no two arrays share a name
            arrays[fused] = 1
        places.append((t.name, Place(fused, arrays[fused] - 1)))
        arrays[fused] += t.rows - 1
    whole = tuple((name, rows + -rows % config.pack) for name, rows in arrays.items())
    return Layout(schema=schema, config=config, arrays=whole, places=tuple(places))


def count(schema: Schema, config: TableConfig) -> int:
    """Parameters of the tables, without the rows of id 0: sum of (rows - 1) (E + K)."""
    per_row = config.width + (len(schema.tasks) if config.biases else 0)
    return sum(t.rows - 1 for t in schema.tables) * per_row


def init(
    key: jax.Array, schema: Schema, config: TableConfig, layout: Layout | None = None
) -> Tables:
    """{array: {"embedding": [rows / pack, pack E], "bias": [rows, K]}} float32; "bias" only if
    configured.

    Normal with std init_std, zeros in row 0; biases are 0. Call it under jit (with output
    shardings no device ever holds more than its part). layout: with rows to spare at an array's
    end, None = `plan`'s; the rows that both have are alike.
    """
    tables: Tables = {}
    layout = layout or plan(schema, config)
    for index, (name, rows) in enumerate(layout.arrays):
        shape = rows // config.pack, config.pack * config.width
        x_lw = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
        line, place = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        missing = (line == 0) & (place < config.width)
        tables[name] = {"embedding": jnp.where(missing, 0.0, config.init_std * x_lw)}
        if config.biases:
            tables[name]["bias"] = jnp.zeros((rows, len(schema.tasks)), jnp.float32)
    return tables


def init_optimizer(tables: Tables, config: TableConfig) -> Tables:
    """The accumulators, one float32 per row: {array: {"embedding": [rows], "bias": [rows]}}."""
    of = lambda rows: jnp.full(rows, config.initial_accumulator, jnp.float32)
    return {
        name: {k: of(lines.rows(x, packed(k, config.pack))) for k, x in table.items()}
        for name, table in tables.items()
    }


def packed(kind: str, pack: int) -> int:
    """Of a table's arrays only the embeddings are packed."""
    return pack if kind == "embedding" else 1


def deduplicate(layout: Layout, batch: Batch, method: Method | None = None) -> Ids:
    """The distinct rows that a batch names; traceable.

    method: one of METHODS for every array; None = "whole" for an array with few rows for the
      batch's number of ids, else "hash" (platform tpu: "sort"). All give the same updates; the
      static capacity U is min(rows - 1, ids) + 1 (whole: rows).
    Raises ValueError for an unknown method, a batch without candidates, and one that lacks a
    feature of the schema.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"deduplicate: method={method!r}, expected one of {METHODS} or None")
    batch.check(layout.schema)
    unique: dict[str, jax.Array | None] = {}
    inverse: dict[str, tuple[jax.Array, ...]] = {}
    for array, rows in layout.arrays:
        ids = []
        for part, f in layout.slots(array):
            x = jnp.asarray(getattr(batch, part)[f.name], jnp.int32)
            ids.append(jnp.where(x > 0, x + layout.place(f.table).offset, 0))
        n = sum(x.size for x in ids)
        whole = rows <= WHOLE_ROWS_PER_ID * n if method is None else method == "whole"
        if whole or n == 0:  # a table that no feature reads has nothing to find
            unique[array] = None if n else jnp.zeros(1, jnp.int32)
            inverse[array] = tuple(ids)
            continue
        flat = jnp.concatenate([x.ravel() for x in ids])
        unique[array], position = distinct.find(flat, rows, method)
        ends = np.cumsum([x.size for x in ids])[:-1]
        inverse[array] = tuple(p.reshape(x.shape) for p, x in zip(jnp.split(position, ends), ids))
    return Ids(unique=unique, inverse=inverse, pack=layout.config.pack)


def gather(tables: Tables, ids: Ids) -> Tables:
    """The batch's rows: {array: {"embedding": [U, E], "bias": [U, K]}}; of unused positions
    the array's last row, which nothing reads."""

    return {
        name: take(table, ids.unique[name], ids.pack, mode="clip") for name, table in tables.items()
    }


def take(
    table: dict[str, jax.Array], unique: jax.Array | None, pack: int, **options: object
) -> dict[str, jax.Array]:
    """Rows of one table, of all kinds; None = all in order. options: of `lines.take`."""

    def of(kind: str, x: jax.Array) -> jax.Array:
        own = packed(kind, pack)
        if unique is None:
            return x.reshape(lines.rows(x, own), -1)
        return lines.take(x, unique, own, **options)

    return {kind: of(kind, x) for kind, x in table.items()}


@jax.custom_vjp
def _lookup(rows_ue: jax.Array, positions: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """rows[p] for each p. The derivative adds every slot into one array, in turn and in place;
    autodiff would make an array [U, E] per slot and add them up."""
    return tuple(rows_ue.at[p].get(mode="promise_in_bounds") for p in positions)


def _lookup_forward(rows_ue, positions):
    return _lookup(rows_ue, positions), (rows_ue, positions)


def _lookup_backward(residuals, gradients):
    rows_ue, positions = residuals
    sum_ue = jnp.zeros_like(rows_ue)
    for p, g in zip(positions, gradients):
        sum_ue = sum_ue.at[p].add(g, mode="promise_in_bounds")
    return sum_ue, None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def features(layout: Layout, rows: Tables, ids: Ids, batch: Batch) -> tuple[Features, jax.Array]:
    """The batch with rows for ids, and the sum of the per-id biases.

    Returns: Features, float32 embeddings [..., E] ("ids": mean over the non-zero values, zeros
    where there are none; "dense": [..., 1]); bias_logits float32 [R, C, K], the sum over the id
    features of the candidate and of its sample's user; 0 at padding and without biases. History
    has no biases: an event adds no constant to a candidate's score.
    """
    R, C = batch.candidate_sample.shape
    K = len(layout.schema.tasks)
    out: dict[str, dict[str, jax.Array]] = {"user": {}, "history": {}, "candidate": {}}
    bias_rck = jnp.zeros((R, C, K), jnp.float32)
    for array, _ in layout.arrays:
        slots, inverse = layout.slots(array), ids.inverse[array]
        found = _lookup(rows[array]["embedding"], inverse)
        for (part, f), position, x in zip(slots, inverse, found):
            out[part][f.name] = _pool(f, position, x)
        if not layout.config.biases:
            continue
        scored = [i for i, (part, _) in enumerate(slots) if part != "history"]
        found = _lookup(rows[array]["bias"], tuple(inverse[i] for i in scored))
        for i, x in zip(scored, found):
            part, f = slots[i]
            bias = _pool(f, inverse[i], x)
            bias_rck += _of_candidate(bias, batch) if part == "user" else bias
    bias_rck = jnp.where((batch.candidate_sample >= 0)[..., None], bias_rck, 0.0)
    schema = layout.schema
    for part, kinds in (
        *(("user", schema.user), ("history", schema.history)),
        *(("candidate", schema.candidate),),
    ):
        for f in kinds:
            if f.kind == "dense":
                out[part][f.name] = jnp.asarray(getattr(batch, part)[f.name], jnp.float32)[
                    ..., None
                ]
        # Schema order, whatever array a feature's table lies in: tokenizers go by it.
        out[part] = {f.name: out[part][f.name] for f in kinds}
    kept = ("history_sample", "candidate_sample", "history_time", "candidate_time")
    kept += ("history_order", "candidate_order", "schema", "one_time")
    done = batch.history[schema.action.name] if schema.action else 0 * batch.history_sample
    out["history_action"] = jnp.asarray(done, jnp.int32)
    return Features(**out, **{name: getattr(batch, name) for name in kept}), bias_rck


def _pool(f: Feature, position: jax.Array, x: jax.Array) -> jax.Array:
    """Multi-valued [..., M, E] -> mean over the values whose id is not 0; others unchanged."""
    if f.kind != "ids":
        return x
    # Row 0 is zeros, so that unused values add nothing to the sum.
    used = jnp.sum(position > 0, axis=-1, dtype=jnp.float32)
    return x.sum(axis=-2) / jnp.maximum(used, 1.0)[..., None]


def _of_candidate(x_rgk: jax.Array, batch: Batch) -> jax.Array:
    """[R, G, K] of samples -> [R, C, K] of their candidates; padding reads sample 0."""
    sample_rc = jnp.maximum(jnp.asarray(batch.candidate_sample), 0)
    return jnp.take_along_axis(x_rgk, sample_rc[..., None], axis=1)


def update(
    tables: Tables,
    optimizer: Tables,
    ids: Ids,
    row_gradients: Tables,
    config: TableConfig,
    rates: dict[str, float | jax.Array] | None = None,
) -> tuple[Tables, Tables]:
    """One step of row-wise Adagrad on the rows of `ids`; other rows keep their bits.

    Args:
      tables, optimizer: from `init` and `init_optimizer`; donate both to the jitted step, so that
        rows are written in place.
      row_gradients: like the result of `gather`; the gradient of row 0 is ignored.
      rates: this step's learning rates {"embedding": ..., "bias": ...}, may be traced (a schedule,
        or one compiled step for many rates); None = those of `config`.
    With `config.clip` all row gradients (embeddings and biases) are scaled to at most that norm.
    Source: row-wise Adagrad as in FBGEMM (EXACT_ROWWISE_ADAGRAD): the mean over the row of g^2.
    """
    # Row 0 (position 0 in every array) never learns.
    gradients = jax.tree.map(lambda g: g.at[0].set(0.0), row_gradients)
    if config.clip is not None:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        scale = config.clip / jnp.maximum(norm, config.clip)
        gradients = jax.tree.map(lambda g: g * scale, gradients)
    if rates is None:
        rates = {"embedding": config.learning_rate, "bias": config.bias_learning_rate}
    new_tables: Tables = {}
    new_optimizer: Tables = {}
    for name, table in tables.items():
        new_tables[name], new_optimizer[name] = {}, {}
        for kind, x_lw in table.items():
            new_tables[name][kind], new_optimizer[name][kind] = adagrad(
                x_lw,
                optimizer[name][kind],
                ids.unique[name],
                gradients[name][kind],
                rates[kind],
                config.eps,
                packed(kind, config.pack),
            )
    return new_tables, new_optimizer


def adagrad(
    x_lw: jax.Array,
    acc_v: jax.Array,
    unique: jax.Array | None,
    g_ue: jax.Array,
    rate: float | jax.Array,
    eps: float,
    pack: int = 1,
) -> tuple[jax.Array, jax.Array]:
    added = jnp.mean(jnp.square(g_ue), axis=-1)
    if unique is None:
        acc_v = acc_v + added
        # A row without gradient subtracts an exact 0.
        step_ve = rate * g_ue / (jnp.sqrt(acc_v) + eps)[:, None]
        return x_lw - step_ve.reshape(x_lw.shape), acc_v
    acc_u = acc_v.at[unique].get(mode="clip") + added
    step_ue = rate * g_ue / (jnp.sqrt(acc_u) + eps)[:, None]
    x_lw = lines.add(x_lw, unique, -step_ue, pack)
    return x_lw, acc_v.at[unique].set(acc_u, mode="drop", unique_indices=True)
