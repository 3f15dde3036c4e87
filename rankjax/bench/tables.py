"""The embedding step alone: what it costs as the table grows."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import embedding, schema
from rankjax.batch import Batch
from rankjax.bench import rounds

ROWS = (10**5, 10**6, 10**7)
IDS = (2048, 50)  # samples x history
DISTRIBUTIONS = ("uniform", "zipf")


def table_ids(rows: int, distribution: str, span: int, seed: int = 0) -> np.ndarray:
    """int32 IDS: the same number of distinct ids whatever `rows`, spread over the whole table.

    Ids are drawn among `span` rows, "uniform" or "zipf" (1 / rank), that are drawn from the whole
    table: only the table's size changes between sizes, not the work that the batch asks for. (Rows
    at equal distances would share few of the cache's sets.)
    """
    rng = np.random.default_rng(seed)
    if distribution == "uniform":
        place = rng.integers(0, span, IDS)
    else:
        share = np.cumsum(1 / np.arange(1, span + 1))
        rank = np.searchsorted(share, rng.random(IDS) * share[-1])
        place = rng.permutation(span)[rank]
    of_table = np.sort(np.random.default_rng(seed + 1).choice(rows - 1, span, replace=False))
    return (1 + of_table[place]).astype(np.int32)


def run(config: rounds.Rounds, *, rows: tuple[int, ...] = ROWS, width: int = 16) -> dict[str, Any]:
    """Seconds of look-up, backward and row-wise Adagrad for 2048 x 50 ids, per table size.

    "flatness" is the largest over the smallest median: 1 where the cost does not depend on the
    table; "flatness_of_minima" the same of the fastest repeats, which a busy machine moves less.
    Peers: nn.Embedding(sparse=True) with Adagrad and SparseAdam on the same ids.
    """
    jobs, items = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for n in rows:
            ids = {d: table_ids(n, d, min(rows) - 1) for d in DISTRIBUTIONS}
            jobs |= {f"{d}/{n}": job for d, job in _embedding_jobs(n, width, ids).items()}
            for distribution, found in ids.items():
                path = pathlib.Path(folder) / f"{distribution}-{n}.npy"
                np.save(path, found)
                for optimizer in ("adagrad", "adam"):
                    name = f"{distribution}/{n}/{optimizer}"
                    item = {"name": name, "kind": "embedding", "ids": str(path), "rows": n}
                    items.append({**item, "width": width, "optimizer": optimizer})
        seconds, peers = rounds.measure(jobs, items, config)
    out: dict[str, Any] = {"ids": list(IDS), "width": width, "peers": peers}
    for distribution in DISTRIBUTIONS:
        steps = {n: rounds.figure(seconds[f"{distribution}/{n}"]) for n in rows}
        medians, minima = ([s[key] for s in steps.values()] for key in ("median", "min"))
        distinct = len(np.unique(table_ids(rows[0], distribution, min(rows) - 1)))
        out[distribution] = {
            "distinct_ids": distinct,
            "seconds": {str(n): s for n, s in steps.items()},
            "flatness": max(medians) / min(medians),
            "flatness_of_minima": max(minima) / min(minima),
        }
    if "results" in peers:
        found = {n: rounds.figure(r["seconds"]) for n, r in peers["results"].items()}
        out["peers"] = {**peers, "results": found}
        out["peer_seconds_over_ours"] = {
            name: s["median"] / rounds.figure(seconds[name.rsplit("/", 1)[0]])["median"]
            for name, s in found.items()
        }
    return out


def _embedding_jobs(
    rows: int, width: int, ids: dict[str, np.ndarray]
) -> dict[str, Callable[[], float]]:
    """One timed step per distribution, on one table that they all update in place."""
    feature = schema.Feature(name="item", side="event", group="item", table="item")
    one = schema.Schema(
        tables=(schema.Table(name="item", rows=rows),),
        features=(feature,),
        tasks=(schema.Task(name="click"),),
        primary_task="click",
    )
    tables_config = embedding.TableConfig(width=width, biases=False)
    layout = embedding.plan(one, tables_config)

    def step(tables, state, batch, g_rse):
        found = embedding.deduplicate(layout, batch)
        looked_up = embedding.gather(tables, found)

        def objective(looked_up):
            features, _ = embedding.features(layout, looked_up, found, batch)
            return jnp.sum(features.history["item"] * g_rse)

        gradient = jax.grad(objective)(looked_up)
        return embedding.update(tables, state, found, gradient, tables_config)

    compiled = jax.jit(step, donate_argnums=(0, 1))
    tables = jax.jit(lambda key: embedding.init(key, one, tables_config))(jax.random.key(0))
    held = {"state": (tables, embedding.init_optimizer(tables, tables_config))}
    rng = np.random.default_rng(1)
    g_rse = jnp.asarray(rng.normal(size=(*IDS, width)).astype(np.float32) / (IDS[0] * IDS[1]))

    def job(item_rs: np.ndarray) -> Callable[[], float]:
        batch = _history_batch(one, item_rs)

        def once() -> Any:
            held["state"] = compiled(*held["state"], batch, g_rse)
            return held["state"]

        return rounds.timed(once)

    return {distribution: job(found) for distribution, found in ids.items()}


def _history_batch(one: schema.Schema, item_rs: np.ndarray) -> Batch:
    """A batch of full histories and one candidate without features a sample."""
    (R, S), zero = item_rs.shape, np.zeros((item_rs.shape[0], 1), np.int32)
    return Batch(
        user={},
        history={"item": item_rs},
        candidate={},
        history_sample=np.zeros((R, S), np.int32),
        candidate_sample=zero,
        history_time=np.full((R, S), -1, np.int32),
        candidate_time=zero,
        history_order=np.full((R, S), -1, np.int32),
        candidate_order=zero,
        labels=np.zeros((R, 1, 1), np.float32),
        weights=np.ones((R, 1, 1), np.float32),
        impression=None,
        schema=one,
        one_time=True,
    )
