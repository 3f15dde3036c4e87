"""`embedding`, over a mesh: rows split over all devices, looked up and updated by exchange.

The four functions of `embedding` that a step calls, with the same arguments and results. A batch's
rows R are split over all axes of the mesh too; every device finds the distinct ids of its own part,
so that "unique" and the rows looked up are [devices * U, ...], a part of each device's own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rankjax import embedding, exchange, lines, sharding
from rankjax.batch import Batch, Features
from rankjax.embedding import Ids, Layout, TableConfig, Tables
from rankjax.schema import Schema


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Stands where the module `embedding` stands on one device."""

    place: sharding.Placement

    @property
    def mesh(self) -> Mesh:
        return self.place.mesh

    @property
    def split(self) -> exchange.Split:
        return exchange.Split(axes=sharding.AXES, shards=self.mesh.size)

    def plan(self, schema: Schema, config: TableConfig) -> Layout:
        """As `embedding.plan`, every array a multiple of the devices long, in lines."""
        layout = embedding.plan(schema, config)
        whole = lambda rows: rows + -rows % (self.mesh.size * config.pack)
        return dataclasses.replace(
            layout, arrays=tuple((name, whole(rows)) for name, rows in layout.arrays)
        )

    def deduplicate(self, layout: Layout, batch: Batch) -> Ids:
        """Raises ValueError for rows that the devices cannot share."""
        R = batch.candidate_sample.shape[0]
        if R % self.mesh.size:
            raise ValueError(
                f"sharded_embedding: a batch of {R} rows on {self.mesh.size} devices, expected a "
                "multiple"
            )
        find = functools.partial(embedding.deduplicate, layout, method="sort")
        return self._each(find, batch)

    def gather(self, tables: Tables, ids: Ids) -> Tables:
        """The rows that each device asks for; zeros at unused positions."""
        return self.fetch(tables, ids)[0]

    def fetch(self, tables: Tables, ids: Ids) -> tuple[Tables, dict[str, jax.Array]]:
        """`gather`, and the rounds of exchange that every array took, int32 []."""

        def fetch(tables: Tables, unique: Any) -> tuple[Tables, dict[str, jax.Array]]:
            found = {}
            for name, table in tables.items():
                share = lines.rows(table["embedding"], ids.pack)
                take = functools.partial(embedding.take, pack=ids.pack, mode="fill", fill_value=0)
                asked = table, unique[name], self.split
                found[name] = exchange.fetch(*asked, share=share, take=take)
            return {k: rows for k, (rows, _) in found.items()}, {
                k: n for k, (_, n) in found.items()
            }

        spec = PartitionSpec(sharding.AXES)
        return self._each(fetch, tables, ids.unique, out_specs=(spec, PartitionSpec()))

    def features(
        self, layout: Layout, rows: Tables, ids: Ids, batch: Batch
    ) -> tuple[Features, jax.Array]:
        """Split along R as a model wants it, which may be over fewer axes than the tables'."""
        found = self._each(functools.partial(embedding.features, layout), rows, ids, batch)
        return self.place.batched(found)

    def init(self, key: jax.Array, schema: Schema, config: TableConfig, layout: Layout) -> Tables:
        """As `embedding.init`; row i is the same whatever the number of devices."""
        tables = embedding.init(key, schema, config, layout)
        return jax.lax.with_sharding_constraint(tables, self.place.rows)

    def update(self, *args: Any) -> tuple[Tables, Tables]:
        """As `embedding.update`; see `send`."""
        return self.send(*args)[:2]

    def send(
        self,
        tables: Tables,
        optimizer: Tables,
        ids: Ids,
        row_gradients: Tables,
        config: TableConfig,
        rates: dict[str, jax.Array],
    ) -> tuple[Tables, Tables, dict[str, jax.Array]]:
        """`update`, and the rounds of exchange that every array took, int32 [].

        The gradients of one row that several devices hold are added up before the update.
        `config.clip` is not read: `step.program` refuses it.
        """

        def send(
            tables: Tables, optimizer: Tables, unique: Any, gradients: Tables, rates: Any
        ) -> tuple[Tables, Tables, dict[str, jax.Array]]:
            out: tuple[dict, dict, dict] = {}, {}, {}
            for name, table in tables.items():
                # Row 0, the first position of every device, never learns.
                own = jax.tree.map(lambda g: g.at[0].set(0.0), gradients[name])
                state, out[2][name] = exchange.send(
                    (table, optimizer[name]),
                    unique[name],
                    own,
                    functools.partial(_adagrad, rates=rates, eps=config.eps, pack=ids.pack),
                    self.split,
                    share=lines.rows(table["embedding"], ids.pack),
                )
                out[0][name], out[1][name] = state
            return out

        spec, whole = PartitionSpec(sharding.AXES), PartitionSpec()
        args = tables, optimizer, ids.unique, row_gradients, rates
        in_specs, out_specs = (spec, spec, spec, spec, whole), (spec, spec, whole)
        return self._each(send, *args, in_specs=in_specs, out_specs=out_specs)

    def exchanged(
        self, tables: Tables, ids: Ids, fetched: dict[str, jax.Array], sent: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """What a step has exchanged, for arrays and the rounds that they took.

        Returns: "fetch_rounds" and "send_rounds", of the array that took most; "bytes" that each
          device sent to others, all arrays and rounds, float32.
        """
        total = jnp.float32(0)
        for name, table in tables.items():
            rows = lines.rows(table["embedding"], ids.pack)
            row = sum(x.size * x.dtype.itemsize for x in table.values()) // rows
            count = ids.unique[name].shape[0] // self.mesh.size
            once = exchange.bytes_of_round(self.split, count, row)
            total += fetched[name] * (once["ids"] + once["rows"])
            total += sent[name] * once["gradients"]
        most = lambda rounds: jnp.stack(list(rounds.values())).max()
        return {"fetch_rounds": most(fetched), "send_rounds": most(sent), "bytes": total}

    def _each(self, function: Any, *args: Any, in_specs: Any = None, out_specs: Any = None) -> Any:
        """function on every device; what no specs are given for is split along the leading axis."""
        spec = PartitionSpec(sharding.AXES)
        run = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs or spec,
            out_specs=out_specs or spec,
            check_vma=False,
        )
        return run(*args)


def _adagrad(
    state: tuple[Any, Any], rows: jax.Array, gradients: Any, *, rates: Any, eps: float, pack: int
) -> tuple[Any, Any]:
    """One step of each kind on rows of this shard."""
    table, optimizer = state
    found = {
        kind: embedding.adagrad(
            *(x, optimizer[kind], rows, gradients[kind], rates[kind], eps),
            pack=embedding.packed(kind, pack),
        )
        for kind, x in table.items()
    }
    new = {kind: x for kind, (x, _) in found.items()}
    return new, {kind: acc for kind, (_, acc) in found.items()}
