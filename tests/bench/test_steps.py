"""steps: the parts learn what the whole learns, and the peers have the same parameters."""

import jax
import numpy as np
import pytest

from rankjax import train
from rankjax.bench import rounds, steps
from rankjax.data import event_log, loader, samples
from rankjax.models import dcnv2, dlrm, hstu, rankmixer
from tests import tiny

ONCE = rounds.Rounds(rounds=1, repeats=1)
MODELS = {
    "dlrm_mlp": dlrm.Config(layers=2, width=8, pooling=("mean",), tasks=2),
    "dcnv2_din": dcnv2.Config(layers=2, width=8, rank=4, attention_hidden=(6, 5), tasks=2),
    "rankmixer": rankmixer.Config(tokens=4, width=8, pooling=("mean", "target"), tasks=2),
    "hstu": hstu.Config(history=10, layers=2, width=8, heads=2, tasks=2),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return event_log.EventLog.open(tiny.log(tmp_path_factory.mktemp("log") / "log"))


def batches(log) -> loader.Batches:
    shape = samples.SampleConfig(organisation="request", history=10)
    return loader.Batches(log, samples.build(log, shape, "train"), batch_samples=6)


def test_batches_share_a_shape_and_are_counted(log):
    found, counts = steps.same_shape(batches(log))
    assert 0 < len(found) <= steps.BATCHES
    assert len({b.candidate_sample.shape for b in found}) == 1
    assert counts == [int((np.asarray(b.candidate_sample) >= 0).sum()) for b in found]


def test_run_reports_every_part(log):
    found = steps.run(log, {"dlrm_mlp": MODELS["dlrm_mlp"]}, ONCE, history=10, batch=16, steps=4)
    model = found["models"]["dlrm_mlp"]
    assert set(model["seconds"]) == {"whole", "blocks", *steps.PARTS}
    assert model["impressions_per_second"] > 0 and 0 <= model["loop"]["loader_wait_share"] <= 1
    assert found["shape"]["S"] <= 10 and "skipped" in found["peers"]


def test_timed_calls_train(log):
    """The whole step and the table update really move what they time."""
    first, _ = steps.same_shape(batches(log))
    bench = steps._Bench(MODELS["dlrm_mlp"], log.schema, train.TrainConfig(), first)
    jobs = bench.jobs()
    before = jax.tree.map(np.array, (bench.state.params, bench.tables[0]))
    jobs["whole"]()
    jobs["table_update"]()
    after = (bench.state.params, bench.tables[0])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, after)
    assert all(jax.tree.leaves(moved)) and int(bench.state.step) == 1


@pytest.mark.slow
def test_peers_have_the_same_parameters(log):
    pytest.importorskip("torch", reason="the PyTorch peers need torch: rankjax[peers]")
    first, _ = steps.same_shape(batches(log))
    benches = {
        n: steps._Bench(m, log.schema, train.TrainConfig(), first) for n, m in MODELS.items()
    }
    items = [steps._peer(name, MODELS[name], bench) for name, bench in benches.items()]
    found = rounds.run_peers(items, ONCE)["results"]
    ours = {name: bench.parameters for name, bench in benches.items()}
    assert {name: found[name]["parameters"] for name in MODELS} == ours
