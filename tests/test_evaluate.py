"""A scored stream holds every impression once, joined to its own label, user, request and truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rankjax import embedding, evaluate
from rankjax.data import event_log, loader, samples
from rankjax.layers import auxiliary
from tests import tiny


@pytest.fixture(scope="module")
def truth():
    """True probabilities of every row of `log`; like is given click."""
    _, files = tiny.columns(requests=300, candidates=6)
    n = len(files["impressions"]["click"])
    rng = np.random.default_rng(1)
    return {"p_click": rng.uniform(0.05, 0.95, n), "p_like": rng.uniform(0.05, 0.95, n)}


@pytest.fixture(scope="module")
def log(tmp_path_factory, truth):
    """A log whose labels are drawn from `truth`."""
    schema, files = tiny.columns(requests=300, candidates=6)
    u, v = np.random.default_rng(2).random((2, len(truth["p_click"])))
    files["impressions"]["click"] = (u < truth["p_click"]).astype(np.int8)
    files["impressions"]["like"] = (files["impressions"]["click"] * (v < truth["p_like"])).astype(
        np.int8
    )
    folder = tmp_path_factory.mktemp("log") / "log"
    return event_log.EventLog.open(event_log.write_log(folder, schema, **files, fingerprint={}))


def scored(log, logits, rows=None):
    """Both tasks with these logits, of all rows in time order (or of these rows)."""
    rows = np.arange(log.rows("impressions")) if rows is None else rows
    return evaluate.Scored(rows, np.stack([logits, logits], -1).astype(np.float32))


def test_joining_drops_padding_and_keeps_the_order():
    pairs = [
        (np.array([[7, -1], [2, 9]]), np.array([[[0.7], [5.0]], [[0.2], [0.9]]])),
        (np.array([[-1, 4], [-1, -1]]), np.array([[[5.0], [0.4]], [[5.0], [5.0]]])),
    ]
    found = evaluate.Scored.of(pairs, 1)
    np.testing.assert_array_equal(found.impression, [7, 2, 9, 4])
    np.testing.assert_allclose(found.logits, [[0.7], [0.2], [0.9], [0.4]], rtol=1e-6)


def test_a_model_of_another_shape_is_refused():
    """One logit a row would broadcast over the candidates."""

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, features, *, train):
            return jnp.zeros((features.candidate_sample.shape[0], 1, 2)), {}

    batch = tiny.batch()
    tables_config = embedding.TableConfig(width=4)
    layout = embedding.plan(batch.schema, tables_config)
    tables = embedding.init(jax.random.key(0), batch.schema, tables_config)
    with pytest.raises(AssertionError, match="shape"):
        evaluate.score(Wrong(), layout, {}, tables, batch.without_impression())


@pytest.mark.parametrize("owns", [False, True])
def test_an_auxiliary_head_gets_the_biases_too(owns):
    """And where it owns the tables, the main logits' biases are constants."""

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, features, *, train):
            x_rck = jnp.zeros((*features.candidate_sample.shape, 2))
            return x_rck, {"head": auxiliary.Logits(x_rck + 1, owns_tables=owns)}

    batch = tiny.batch().without_impression()
    tables_config = embedding.TableConfig(width=4)
    layout = embedding.plan(batch.schema, tables_config)
    tables = embedding.init(jax.random.key(0), batch.schema, tables_config)
    tables = jax.tree.map(lambda x: x + 0.5, tables)
    ids = embedding.deduplicate(layout, batch)

    def main(rows):
        logits, aux = evaluate.apply(Heads(), layout, {}, rows, ids, batch)
        return logits.sum(), (logits, aux["head"].logits)

    gradient, (logits, head) = jax.grad(main, has_aux=True)(embedding.gather(tables, ids))
    valid = batch.candidate_mask
    assert np.abs(np.asarray(logits)[valid]).min() > 0
    np.testing.assert_allclose(head[valid], logits[valid] + 1, rtol=1e-6)
    assert not np.asarray(head)[~valid].any() and not np.asarray(logits)[~valid].any()
    moved = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    assert (moved == 0) == owns


def test_no_batches_give_no_rows():
    found = evaluate.Scored.of([], 2)
    assert found.impression.shape == (0,) and found.logits.shape == (0, 2)


@pytest.mark.parametrize("organisation", samples.ORGANISATIONS)
def test_a_stream_scores_every_impression_once(organisation, log):
    """The scorer returns the labels, so that a logit in another row would show."""
    config = samples.SampleConfig(organisation=organisation, history=4, max_candidates=3)
    chosen = samples.build(log, config, "train")
    batches = loader.Batches(log, chosen, batch_samples=7, order="time")
    found = evaluate.stream(lambda b: b.labels, ((i, batches[i]) for i in range(len(batches))), 2)
    rows = np.flatnonzero(log.column("impressions", "span") == 0)
    np.testing.assert_array_equal(np.sort(found.impression), rows)
    np.testing.assert_array_equal(found.logits, evaluate.labels_of(log, found.impression)[0])


def test_the_scorer_never_sees_which_impressions_it_scores(log):
    chosen = samples.build(log, samples.SampleConfig(organisation="request", history=4), "train")
    batches = loader.Batches(log, chosen, batch_samples=7, order="time")
    seen = []

    def scorer(batch):
        seen.append(batch.impression)
        return batch.labels

    evaluate.stream(scorer, [(0, batches[0])], 2)
    assert seen == [None]


def test_labels_and_weights_of_rows(log):
    rows = np.array([11, 3, 200])
    click, like = (log.column("impressions", name)[rows] for name in ("click", "like"))
    labels, weights = evaluate.labels_of(log, rows)
    assert labels.dtype == weights.dtype == np.float64
    np.testing.assert_array_equal(labels, np.stack([click, like], -1))
    np.testing.assert_array_equal(weights, np.stack([np.ones(3), click], -1))  # like given click


def test_users_and_requests_are_joined_from_the_log(log):
    """Perfect within each group whatever its level: that metric is 1, and only that."""
    rows = np.random.default_rng(0).permutation(log.rows("impressions"))
    click = log.column("impressions", "click")[rows]
    for name, perfect, other in (("user", "gauc", "auc"), ("request", "request_auc", "gauc")):
        _, group = np.unique(log.column("impressions", name)[rows], return_inverse=True)
        level = 10 * np.random.default_rng(3).random(group.max() + 1)
        found = evaluate.summarize(log, scored(log, click + level[group], rows))["click"]
        assert found[perfect] == 1.0
        assert found[other] < 0.95


def test_a_task_counts_where_its_weight_does(log):
    click, like = (log.column("impressions", name)[:] for name in ("click", "like"))
    found = evaluate.summarize(log, scored(log, np.where(like, 1.0, -1.0)))
    assert found["click"]["impressions"] == len(click)
    assert found["like"]["impressions"] == click.sum()
    assert found["like"]["auc"] == 1.0 > found["click"]["auc"]


def logit(p):
    return np.log(p) - np.log1p(-p)


def test_alarms_are_silent_on_honest_predictions(log, truth):
    """The oracle itself, row for row in any order, and a constant."""
    rows = np.random.default_rng(0).permutation(log.rows("impressions"))
    both = np.stack([logit(truth["p_click"][rows]), logit(truth["p_like"][rows])], -1)
    found = evaluate.alarms(log, evaluate.Scored(rows, both), truth)
    assert found.keys() == {"click", "like"}
    for one in found.values():
        assert not one.alarm
        assert abs(one.gap) < 1e-9 and one.advantage_nats < 1e-6
    for p in (0.3, 0.5, 0.7):
        found = evaluate.alarms(log, scored(log, np.full(len(rows), logit(p))), truth)
        assert not any(one.alarm for one in found.values())


@pytest.mark.parametrize("task", ["click", "like"])
def test_an_alarm_rings_for_a_planted_label(task, log, truth):
    label = log.column("impressions", task)
    found = evaluate.alarms(log, scored(log, np.where(label, 3.0, -3.0)), truth)
    assert found[task].alarm and found[task].ville and found[task].sigma


def test_control_labels_ring_no_alarm_and_hide_no_leak(tmp_path):
    """Labels that nothing predicts: honest models lose to the base rate, a leak still shows."""
    folder = tiny.log(tmp_path / "log", requests=300, tasks=("click",))
    log = event_log.EventLog.open(folder)
    n = log.rows("impressions")
    truth = {"p_click": np.full(n, 0.3)}
    rng = np.random.default_rng(0)
    for logits in (np.full(n, logit(0.3)), logit(0.3) + 0.3 * rng.normal(size=n)):
        one = evaluate.Scored(np.arange(n), logits[:, None])
        assert not evaluate.alarms(log, one, truth)["click"].alarm
    leak = logit(0.3) + 0.5 * (log.column("impressions", "click") - 0.3)
    assert evaluate.alarms(log, evaluate.Scored(np.arange(n), leak[:, None]), truth)["click"].alarm


def test_tasks_without_truth_have_no_alarm(log, truth):
    n = log.rows("impressions")
    found = evaluate.alarms(log, scored(log, np.zeros(n)), {"p_click": truth["p_click"]})
    assert found.keys() == {"click"}
