"""A model's sizes, and its FLOPs at any lengths, against direct counts."""

import dataclasses

import jax
import pytest

from rankjax import embedding, flops, models, train
from rankjax.data import event_log, samples
from rankjax.scaling import sizes, trial
from tests import tiny
from tests.models.test_all_models import CONFIGS

CASES = [(name, True) for name in CONFIGS]
CASES += [(name, False) for name in CONFIGS if models.MODELS[name].windows]
E = 4


def spec_of(model, organisation="request"):
    training = train.TrainConfig(batch=32, tables=embedding.TableConfig(width=E, init_std=0.3))
    chosen = samples.SampleConfig(organisation=organisation, history=10, max_candidates=4)
    return trial.Trial(model=model, training=training, samples=chosen, budget=None)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "log"
    return event_log.EventLog.open(tiny.log(folder, requests=150, events=400))


@pytest.mark.slow
@pytest.mark.parametrize("name, one_time", CASES)
def test_flops_of_a_sample_are_exact_at_other_lengths(name, one_time, log):
    config = CONFIGS[name]
    if hasattr(config, "implementation"):  # what is counted, whatever runs
        config = dataclasses.replace(config, implementation="reference")
    module = models.MODELS[name](config)
    params = sizes.abstract_params(CONFIGS[name], log.schema, E)

    def forward(features, params):
        rngs = {"dropout": jax.random.key(0)}
        return module.apply({"params": params}, features, train=True, rngs=rngs)[0]

    per_sample = sizes.forward_flops(CONFIGS[name], log.schema, E, one_time)
    for history, candidates in ((9, 7), (4, 1), (1, 6), (7, 2), (8, 2)):
        features = sizes.abstract_features(log.schema, E, 1, history, candidates, one_time)
        direct = flops.count(forward, features, params).total
        assert float(per_sample((history, candidates))) == direct > 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_parameters_are_those_of_the_state(name, log):
    spec = spec_of(CONFIGS[name])
    batches = train.batches(log, spec.training, samples.build(log, spec.samples, "train"))
    state = train.init(spec.model, log.schema, spec.training, batches[0])
    found = sizes.columns(spec.model, spec.training, log.schema, batches)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert found["dense_params"] == count(state.params)
    # Every stored row but the zero rows, which stand for "missing" and are no parameters.
    stored = count(state.tables)
    per_row = stored // sum(t["embedding"].shape[0] for t in state.tables.values())
    assert found["embedding_params"] == stored - per_row * len(state.tables)


@pytest.mark.parametrize("name, one_time", CASES)
def test_padding_and_flops_by_hand(name, one_time, log):
    """From the batches themselves: every slot that they hold, and every sample's own lengths."""
    spec = spec_of(CONFIGS[name], "request" if one_time else "window")
    chosen = samples.build(log, spec.samples, "train")
    batches = train.batches(log, spec.training, chosen)
    per_sample = sizes.forward_flops(spec.model, log.schema, E, one_time)
    slots = valid = candidates = 0
    padded = own = 0.0
    for step in range(len(batches)):
        batch = batches[step]
        h, c = batch.history_sample >= 0, batch.candidate_sample >= 0
        slots += h.size + c.size
        valid += h.sum() + c.sum()
        candidates += c.sum()
        padded += len(h) * float(per_sample((h.shape[1], c.shape[1])))
        own += sum(float(per_sample((s, n))) for s, n in zip(h.sum(1), c.sum(1)) if n)
    found = sizes.columns(spec.model, spec.training, log.schema, batches)
    assert found["padding_share"] == pytest.approx(1 - valid / slots)
    assert 0 < found["padding_share"] < 1
    assert found["flops"] == pytest.approx(3 * padded / candidates)
    assert found["flops_valid"] == pytest.approx(3 * own / candidates)
    assert found["flops_matmul"] < found["flops_valid"] < found["flops"]
    assert found["training_flops"] == pytest.approx(3 * own)
    assert candidates == len(chosen.impressions)


def test_axes_are_reported_under_their_letters(log):
    def letters(name):
        spec = spec_of(CONFIGS[name])
        chosen = samples.build(log, spec.samples, "train")
        batches = train.batches(log, spec.training, chosen)
        found = sizes.columns(spec.model, spec.training, log.schema, batches)
        return found["tokens"], found["layers"], found["width"]

    assert letters("dlrm_mlp") == (None, 2, 8)
    assert letters("rankmixer") == (4, 2, 8)
    assert letters("hstu") == (16, 2, 8)
