"""One process of several that train together: `python -m tests.one_of_many_hosts '{JSON}'`.

The settings: coordinator, index, count, log, out (a folder), and maybe die (host, step: SIGKILL
there), stop (host, step: SIGTERM there), clock (host, seconds ahead). Leaves `out`'s parameters and
predictions in out/final-INDEX.npz.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from rankjax import embedding, hosts, optim, sharding, train
from rankjax.data import event_log, samples
from rankjax.models import dlrm

asked = json.loads(sys.argv[1])
jax.config.update("jax_disable_most_optimizations", True)
MODEL = dlrm.Config(layers=1, width=8, tasks=2)
CONFIG = train.TrainConfig(
    batch=60,  # not a multiple of four
    log_every=2,
    checkpoint_seconds=0.0,
    tables=embedding.TableConfig(width=4, init_std=0.3),
    # Adam with its usual eps steps by the sign of what is rounding.
    optimizer=optim.OptimConfig(learning_rate=3e-3, eps=1e-3),
)


def on_step(done: int, total: int) -> None:
    for what, which in (("die", signal.SIGKILL), ("stop", signal.SIGTERM)):
        host, step = asked.get(what) or (None, None)
        if host == jax.process_index() and done == step:
            os.kill(os.getpid(), which)


def main() -> None:
    alone = asked["count"] == 1
    where = {k: None if alone else asked[k] for k in ("coordinator", "count", "index")}
    host, ahead = asked.get("clock") or (None, 0)
    if host == asked["index"]:
        now = time.time
        time.time = lambda: now() + ahead
    hosts.join(hosts.HostConfig(**where, timeout=60))
    log = event_log.EventLog.open(asked["log"])
    chosen = samples.build(log, samples.SampleConfig(organisation="request", history=10), "train")
    place = sharding.placement(sharding.MeshConfig())
    out = pathlib.Path(asked["out"])
    done = train.run(log, MODEL, CONFIG, chosen, out, on_step=on_step, place=place)
    assert hosts.any_of(asked["index"] == 0, False) == (True, False)
    order = np.argsort(done.progressive.impression)
    parts = {"params": done.state.params, "tables": done.state.tables}
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.local(x)
        for path, x in jax.tree.leaves_with_path(parts)
    }
    np.savez(
        out / f"final-{asked['index']}.npz",
        steps_now=done.steps_now,
        impression=done.progressive.impression[order],
        logits=done.progressive.logits[order],
        **arrays,
    )


if __name__ == "__main__":
    with hosts.ending_at_once():
        main()
