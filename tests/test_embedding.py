import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import batch as batch_module
from rankjax import embedding
from rankjax import schema as schemas
from rankjax.packing import pack
from tests import tiny
from tests.references import embedding as reference

CONFIG = embedding.TableConfig(
    width=4, learning_rate=0.3, bias_learning_rate=0.2, eps=1e-3, initial_accumulator=0.01
)
METHODS = (None, *embedding.METHODS)


@pytest.fixture
def split_tables(monkeypatch):
    """Several fused arrays and one table on its own, at the sizes of a test."""
    monkeypatch.setattr(embedding, "FUSED_ROWS", 26)


def tiny_batches(steps, **options):
    return [tiny.batch(seed=i, **options).without_impression() for i in range(steps)]


def start(schema, config=CONFIG):
    """Layout, tables with random biases (0 would hide a forgotten one), accumulators."""
    tables = jax.jit(lambda key: embedding.init(key, schema, config))(jax.random.key(0))
    for i, table in enumerate(tables.values()):
        if "bias" in table:
            bias = jax.random.normal(jax.random.key(i), table["bias"].shape)
            table["bias"] = bias.at[0].set(0.0)
    return embedding.plan(schema, config), tables, embedding.init_optimizer(tables, config)


def cotangents(layout, batch, seed):
    """Random weights for every output of `features`: the loss is their scalar product."""
    E, K = layout.config.width, len(layout.schema.tasks)
    rng = np.random.default_rng(seed)
    s = layout.schema
    weights = {
        part: {
            f.name: rng.normal(size=(*getattr(batch, part)[f.name].shape[:2], E)).astype("f4")
            for f in features_
            if f.table
        }
        for part, features_ in (
            ("user", s.user),
            ("history", s.history),
            ("candidate", s.candidate),
        )
    }
    return weights, rng.normal(size=(*batch.candidate_sample.shape, K)).astype("f4")


def step(layout, method, config, tables, optimizer, batch, weights, bias_weights):
    ids = embedding.deduplicate(layout, batch, method)

    def loss(rows):
        found, bias_rck = embedding.features(layout, rows, ids, batch)
        total = jnp.sum(bias_rck * bias_weights)
        for part, by_name in weights.items():
            for name, w in by_name.items():
                total += jnp.sum(getattr(found, part)[name] * w)
        return total

    gradients = jax.grad(loss)(embedding.gather(tables, ids))
    return embedding.update(tables, optimizer, ids, gradients, config)


def jit_step(layout, method=None, config=CONFIG):
    return jax.jit(functools.partial(step, layout, method, config))


def table_of(layout, state, table, kind):
    """The rows (or accumulators) of one schema table, float64, ids as indices."""
    place = layout.place(table.name)
    x = np.asarray(state[place.array][kind], np.float64)
    return np.concatenate([x[:1], x[place.offset + 1 : place.offset + table.rows]])


def by_table(layout, state, kind):
    return {t.name: table_of(layout, state, t, kind) for t in layout.schema.tables}


def reference_gradients(schema, tables, biases, batch, weights, bias_weights):
    """Dense gradients of the loss of `step` for every table: embeddings, biases."""
    g_tables = {name: np.zeros_like(x) for name, x in tables.items()}
    g_biases = {name: np.zeros_like(x) for name, x in biases.items()}
    sample = np.asarray(batch.candidate_sample)
    g_rck = bias_weights.astype(np.float64) * (sample >= 0)[..., None]
    parts = (("user", schema.user), ("history", schema.history), ("candidate", schema.candidate))
    for part, features_ in parts:
        for f in (f for f in features_ if f.table):
            ids = np.asarray(getattr(batch, part)[f.name])
            cells = ids.reshape(-1, f.values) if f.kind == "ids" else ids.ravel()
            g = weights[part][f.name].astype(np.float64)
            x = tables[f.table]
            g_tables[f.table] += reference.dense_gradient(x, cells, g.reshape(-1, x.shape[1]))
            if part == "history":
                continue
            g = g_rck
            if part == "user":  # a sample's user bias enters all of its candidates
                g = np.stack(
                    [(g_rck * (sample == s)[..., None]).sum(1) for s in range(ids.shape[1])], 1
                )
            x = biases[f.table]
            g_biases[f.table] += reference.dense_gradient(x, cells, g.reshape(-1, x.shape[1]))
    return g_tables, g_biases


@pytest.mark.parametrize(
    ("method", "packed", "clip"),
    [(None, False, None), ("whole", True, 0.5), ("hash", False, 0.5), ("sort", True, 1e6)],
)
def test_equals_row_wise_adagrad_with_dense_gradients(method, packed, clip, split_tables):
    """Duplicates in and across features, history and candidates; several steps."""
    batches = tiny_batches(4)
    if packed:
        batches = [pack(b, 3) for b in batches]
    schema = batches[0].schema
    config = dataclasses.replace(CONFIG, clip=clip)
    layout, tables, optimizer = start(schema, config)
    assert len(layout.arrays) > 2
    want = {k: by_table(layout, tables, k) for k in ("embedding", "bias")}
    acc = {k: by_table(layout, optimizer, k) for k in ("embedding", "bias")}
    run = jit_step(layout, method, config)
    for i, batch in enumerate(batches):
        weights, bias_weights = cotangents(layout, batch, i)
        tables, optimizer = run(tables, optimizer, batch, weights, bias_weights)
        g_tables, g_biases = reference_gradients(
            schema, want["embedding"], want["bias"], batch, weights, bias_weights
        )
        norm = np.sqrt(sum((g**2).sum() for g in [*g_tables.values(), *g_biases.values()]))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        for kind, gradients, rate in (("embedding", g_tables, 0.3), ("bias", g_biases, 0.2)):
            for name, g in gradients.items():
                want[kind][name], acc[kind][name] = reference.rowwise_adagrad(
                    want[kind][name], acc[kind][name], g * scale, rate, config.eps
                )
    for kind in ("embedding", "bias"):
        for name, found in by_table(layout, tables, kind).items():
            np.testing.assert_allclose(found, want[kind][name], rtol=0, atol=2e-5)
        for name, found in by_table(layout, optimizer, kind).items():
            np.testing.assert_allclose(found, acc[kind][name], rtol=2e-5, atol=1e-6)


def test_all_methods_agree():
    """They differ in the order of the distinct rows only, not in that of the sums."""
    batches = tiny_batches(3)
    layout, tables, optimizer = start(batches[0].schema)
    results = {}
    for method in embedding.METHODS:
        state, run = (tables, optimizer), jit_step(layout, method)
        for i, batch in enumerate(batches):
            state = run(*state, batch, *cotangents(layout, batch, i))
        results[method] = jax.tree.map(np.asarray, state)
    jax.tree.map(np.testing.assert_array_equal, results["hash"], results["sort"])
    # Over whole arrays the compiler contracts the last subtraction into a multiply-add.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, results["whole"], results["sort"])


@pytest.mark.parametrize("method", METHODS)
def test_missing_ids_and_untouched_rows_keep_their_bits(method, split_tables):
    batch = tiny_batches(1)[0]
    layout, tables, optimizer = start(batch.schema)
    weights = cotangents(layout, batch, 0)
    new, new_optimizer = jit_step(layout, method)(tables, optimizer, batch, *weights)
    for array, rows in layout.arrays:
        touched, scored = set(), set()
        for part, f in layout.slots(array):
            x = np.asarray(getattr(batch, part)[f.name])
            at = set((x[x > 0] + layout.place(f.table).offset).tolist())
            touched |= at
            scored |= at if part != "history" else set()
        for kind, moved in (("embedding", touched), ("bias", scored)):
            still = sorted(set(range(rows)) - moved)
            assert 0 in still
            for before, after in ((tables, new), (optimizer, new_optimizer)):
                x, y = np.asarray(before[array][kind]), np.asarray(after[array][kind])
                np.testing.assert_array_equal(x[still].view("i4"), y[still].view("i4"))
                assert (x[sorted(moved)] != y[sorted(moved)]).all()
        assert not np.asarray(new[array]["embedding"][0]).any()
        assert not np.asarray(new[array]["bias"][0]).any()


def test_history_and_candidates_share_rows():
    """An item in both receives the sum of both gradients, in one Adagrad step."""
    batch = tiny_batches(1)[0]
    history = {k: np.zeros_like(x) for k, x in batch.history.items()}
    candidate = {k: np.zeros_like(x) for k, x in batch.candidate.items()}
    history["item"][1, 2] = candidate["item"][0, 0] = candidate["item"][2, 1] = 7
    batch = dataclasses.replace(batch, history=history, candidate=candidate)
    layout, tables, optimizer = start(batch.schema)
    weights, bias_weights = cotangents(layout, batch, 0)
    new, _ = jit_step(layout)(tables, optimizer, batch, weights, bias_weights)
    w, c = weights["history"]["item"], weights["candidate"]["item"]
    g = w[1, 2].astype(float) + c[0, 0] + c[2, 1]
    moved = table_of(layout, new, batch.schema.table("item"), "embedding")[7]
    before = table_of(layout, tables, batch.schema.table("item"), "embedding")[7]
    want = before - 0.3 * g / (np.sqrt(0.01 + np.mean(g**2)) + 1e-3)
    np.testing.assert_allclose(moved, want, rtol=0, atol=1e-6)


def scored(layout, tables, batch, method=None):
    ids = embedding.deduplicate(layout, batch, method)
    return embedding.features(layout, embedding.gather(tables, ids), ids, batch)


@pytest.mark.parametrize("method", METHODS)
def test_features_and_biases(method, split_tables):
    batch = tiny_batches(1)[0]
    schema = batch.schema
    layout, tables, _ = start(schema)
    found, bias_rck = jax.jit(functools.partial(scored, layout, method=method))(tables, batch)
    rows = by_table(layout, tables, "embedding")
    biases = by_table(layout, tables, "bias")
    want_bias = np.zeros(bias_rck.shape)
    parts = (("user", schema.user), ("history", schema.history), ("candidate", schema.candidate))
    for part, features_ in parts:
        assert set(getattr(found, part)) == {f.name for f in features_}
        for f in features_:
            x, ids = np.asarray(getattr(found, part)[f.name]), getattr(batch, part)[f.name]
            assert x.dtype == np.float32
            if f.kind == "dense":
                np.testing.assert_array_equal(x, ids[..., None])
                continue
            look_up = reference.embed
            if f.kind == "ids":
                look_up = lambda t, i: np.apply_along_axis(
                    functools.partial(reference.mean_pool, t), -1, i
                )
            np.testing.assert_allclose(x, look_up(rows[f.table], ids), rtol=0, atol=1e-6)
            if part != "history":
                want_bias = want_bias + look_up(biases[f.table], ids)
    want_bias *= (batch.candidate_sample >= 0)[..., None]
    assert np.abs(want_bias).min(where=want_bias != 0, initial=9) > 0
    np.testing.assert_allclose(bias_rck, want_bias, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.history_order, batch.history_order)


def test_multi_valued_features_skip_zeros():
    batch = tiny_batches(1)[0]
    tags = np.zeros_like(batch.candidate["tags"])
    tags[0, 0], tags[0, 1], tags[0, 2] = (5, 0, 9), (0, 0, 0), (5, 5, 9)
    batch = dataclasses.replace(batch, candidate={**batch.candidate, "tags": tags})
    layout, tables, _ = start(batch.schema)
    x = scored(layout, tables, batch)[0].candidate["tags"]
    rows = table_of(layout, tables, batch.schema.table("tag"), "embedding")
    np.testing.assert_allclose(x[0, 0], (rows[5] + rows[9]) / 2, atol=1e-6)
    np.testing.assert_array_equal(x[0, 1], 0)
    np.testing.assert_allclose(x[0, 2], (2 * rows[5] + rows[9]) / 3, atol=1e-6)


def test_packed_rows_score_alike():
    batch = tiny_batches(1)[0]
    layout, tables, _ = start(batch.schema)
    found, bias_rck = scored(layout, tables, batch)
    packed, packed_bias = scored(layout, tables, pack(batch, 3))
    side_by_side = lambda x: np.asarray(x).reshape(2, -1, *x.shape[2:])
    np.testing.assert_array_equal(side_by_side(bias_rck), packed_bias)
    for part in ("user", "history", "candidate"):
        assert list(getattr(found, part)) == [f.name for f in getattr(batch.schema, part)]
        for name, x in getattr(found, part).items():
            np.testing.assert_array_equal(side_by_side(x), getattr(packed, part)[name])


def test_without_biases():
    batch = tiny_batches(1)[0]
    layout, tables, optimizer = start(batch.schema, dataclasses.replace(CONFIG, biases=False))
    assert all(list(table) == ["embedding"] for table in tables.values())
    weights = cotangents(layout, batch, 0)
    new, _ = jit_step(layout, config=layout.config)(tables, optimizer, batch, *weights)
    assert jax.tree.structure(new) == jax.tree.structure(tables)
    np.testing.assert_array_equal(scored(layout, tables, batch)[1], 0)


def test_rates_of_the_call_replace_those_of_the_configuration():
    batch = tiny_batches(1)[0]
    layout, tables, optimizer = start(batch.schema)
    ids = embedding.deduplicate(layout, batch)
    gradients = jax.tree.map(jnp.ones_like, embedding.gather(tables, ids))
    run = jax.jit(
        lambda rates: embedding.update(tables, optimizer, ids, gradients, CONFIG, rates)[0]
    )
    new = run({"embedding": jnp.float32(0.6), "bias": jnp.float32(0.0)})
    plain, _ = embedding.update(tables, optimizer, ids, gradients, CONFIG)
    for name, table in tables.items():
        np.testing.assert_array_equal(new[name]["bias"], table["bias"])
        twice = new[name]["embedding"] - table["embedding"]
        once = plain[name]["embedding"] - table["embedding"]
        assert np.abs(once).max() > 0.1
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-6)


def two_tables(*rows):
    names = "abcdef"[: len(rows)]
    return schemas.Schema(
        tables=tuple(schemas.Table(name=n, rows=r) for n, r in zip(names, rows)),
        features=tuple(schemas.Feature(name=n, side="item", group="g", table=n) for n in names),
        tasks=(schemas.Task(name="click"),),
        primary_task="click",
    )


def test_plan_fuses_small_tables_and_keeps_large_ones_apart():
    large = embedding.FUSED_ROWS
    layout = embedding.plan(two_tables(10, large, 5, large - 9, 7), CONFIG)
    assert layout.arrays == (("a", 14), ("b", large), ("d", large - 9 + 6))
    offsets = {name: (p.array, p.offset) for name, p in layout.places}
    assert offsets == {
        "a": ("a", 0),
        "b": ("b", 0),
        "c": ("a", 9),
        "d": ("d", 0),
        "e": ("d", large - 10),
    }
    hash(layout)  # static under jit


def test_plan_gives_every_id_its_own_row(split_tables):
    layout = embedding.plan(two_tables(10, 30, 5, 20, 7, 26), CONFIG)
    taken = [(layout.place(t.name).array, layout.place(t.name).offset + i)
             for t in layout.schema.tables for i in range(1, t.rows)]  # fmt: skip
    assert len(set(taken)) == len(taken)
    want = [(name, row) for name, rows in layout.arrays for row in range(1, rows)]
    assert sorted(taken) == sorted(want)


def test_count():
    schema = dataclasses.replace(two_tables(10, 30), tasks=tuple(map(task, ("click", "like"))))
    config = embedding.TableConfig(width=16)
    assert embedding.count(schema, config) == (9 + 29) * (16 + 2)
    no_bias = dataclasses.replace(config, biases=False)
    assert embedding.count(schema, no_bias) == (9 + 29) * 16
    leaves = jax.tree.leaves(embedding.init(jax.random.key(0), schema, config))
    assert sum(x.size for x in leaves) == embedding.count(schema, config) + 16 + 2


def task(name):
    return schemas.Task(name=name)


def test_init():
    config = embedding.TableConfig(width=8, init_std=0.5)
    tables = embedding.init(jax.random.key(1), two_tables(4000), config)
    x = np.asarray(tables["a"]["embedding"])
    assert not x[0].any() and x[1:].all()
    assert abs(x[1:].std() - 0.5) < 0.01 and abs(x[1:].mean()) < 0.01
    assert not np.asarray(tables["a"]["bias"]).any()
    optimizer = embedding.init_optimizer(
        tables, dataclasses.replace(config, initial_accumulator=0.25)
    )
    assert optimizer["a"]["embedding"].shape == optimizer["a"]["bias"].shape == (4000,)
    assert (np.asarray(optimizer["a"]["bias"]) == 0.25).all()


def test_no_step_copies_a_table():
    """With donation nothing of the size of the table is made: its cost is that of its rows."""
    schema = two_tables(5_000_000)
    layout = embedding.plan(schema, CONFIG)
    zeros = np.zeros((8, 16), np.int32)
    batch = batch_module.Batch(
        user={},
        history={"a": zeros},
        candidate={"a": zeros[:, :2]},
        **{f"history_{name}": zeros for name in ("sample", "time", "order")},
        **{f"candidate_{name}": zeros[:, :2] for name in ("sample", "time", "order")},
        labels=np.zeros((8, 2, 1), np.float32),
        weights=np.zeros((8, 2, 1), np.float32),
        impression=None,
        schema=schema,
        one_time=True,
    )
    tables = jax.eval_shape(lambda: embedding.init(jax.random.key(0), schema, CONFIG))
    optimizer = jax.eval_shape(lambda t: embedding.init_optimizer(t, CONFIG), tables)
    run = jax.jit(functools.partial(step, layout, None, CONFIG), donate_argnums=(0, 1))
    compiled = run.lower(tables, optimizer, batch, *cotangents(layout, batch, 0)).compile()
    memory = compiled.memory_analysis()
    table_bytes = 5_000_000 * 4 * (4 + 1 + 2)
    assert memory.alias_size_in_bytes >= table_bytes
    assert memory.temp_size_in_bytes < 1_000_000
    assert not re.findall(r"= f32\[5000000\S* copy\(", compiled.as_text())


def test_bad_input():
    for field, value in (
        *(("width", 0), ("eps", 0.0), ("clip", 0.0), ("clip", -1.0)),
        *(("learning_rate", float("nan")), ("init_std", -0.1), ("bias_learning_rate", -1.0)),
    ):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            embedding.TableConfig(**{field: value})
    batch = tiny_batches(1)[0]
    with pytest.raises(ValueError, match="method='nosuch'"):
        embedding.deduplicate(embedding.plan(batch.schema, CONFIG), batch, "nosuch")


def test_an_unread_table_is_allowed():
    batch = tiny_batches(1)[0]
    more = (*batch.schema.tables, schemas.Table(name="unread", rows=embedding.FUSED_ROWS))
    schema = dataclasses.replace(batch.schema, tables=more)
    batch = dataclasses.replace(batch, schema=schema)
    layout, tables, optimizer = start(schema, dataclasses.replace(CONFIG, width=1))
    weights = cotangents(layout, batch, 0)
    new, _ = jit_step(layout, config=layout.config)(tables, optimizer, batch, *weights)
    np.testing.assert_array_equal(new["unread"]["embedding"], tables["unread"]["embedding"])
