import math

import numpy as np
import pytest
import sklearn.metrics
import threadpoolctl

from rankjax import metrics
from rankjax.schema import Feature, Schema, Table, Task
from tests.references import metrics as reference


@pytest.fixture(scope="module")
def rows():
    """Weighted rows with many tied logits, and some of weight 0 that hold nonsense."""
    rng = np.random.default_rng(0)
    n = 3000
    logits = np.round(rng.normal(-1, 1.5, n), 1)
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    weights = rng.choice([0, 0.5, 1, 2], n)
    spoilt = logits.copy()
    spoilt[weights == 0] = np.nan
    return logits, spoilt, labels, weights, rng.integers(0, 90, n)


def test_global_metrics_are_scikit_learns(rows):
    logits, spoilt, labels, weights, _ = rows
    p = 1 / (1 + np.exp(-logits))
    loss = sklearn.metrics.log_loss(labels, p, sample_weight=weights)
    base = np.average(labels, weights=weights)
    entropy = -base * math.log(base) - (1 - base) * math.log(1 - base)
    area = sklearn.metrics.roc_auc_score(labels, logits, sample_weight=weights)
    args = (spoilt, labels, weights)
    assert metrics.log_loss(*args) == pytest.approx(loss, abs=1e-12)
    assert metrics.normalized_entropy(*args) == pytest.approx(loss / entropy, abs=1e-12)
    assert metrics.auc(*args) == pytest.approx(area, abs=1e-12)
    pcoc = (weights * p).sum() / (weights * labels).sum()
    assert metrics.calibration(*args) == pytest.approx(pcoc, abs=1e-12)


def test_auc_by_enumeration_and_ties():
    logits, labels, weights = [0.0, 0, 1, 1, 2, -1], [1, 0, 1, 0, 0, 1], [1, 2, 3, 1, 0.5, 1]
    want = reference.auc(logits, labels, weights)
    assert metrics.auc(logits, labels, weights) == pytest.approx(want, abs=1e-15)
    assert metrics.auc([3, 3, 3], [1, 0, 1]) == 0.5


def test_extreme_logits_keep_their_digits():
    assert metrics.log_loss([800.0, -800.0], [1, 0]) == 0
    assert metrics.log_loss([800.0, 0.0], [0, 1]) == pytest.approx((800 + math.log(2)) / 2)
    assert metrics.calibration([-745.0, 40.0], [0, 1]) == pytest.approx(1)


def test_gauc_weights_users_by_impressions(rows):
    logits, spoilt, labels, weights, user = rows
    area = total = 0.0
    for u in np.unique(user):
        of_user = (user == u) & (weights > 0)
        if 0 < labels[of_user].sum() < of_user.sum():
            w = weights[of_user]
            area += w.sum() * reference.auc(logits[of_user], labels[of_user], w)
            total += w.sum()
    got = metrics.gauc(spoilt, labels, user, weights)
    assert got == pytest.approx(area / total, abs=1e-12)
    # A user with one class only changes nothing.
    extra = (np.r_[spoilt, 9, 8], np.r_[labels, 1, 1], np.r_[user, 999, 999], np.r_[weights, 1, 1])
    assert metrics.gauc(*extra) == pytest.approx(area / total, abs=1e-12)


def test_per_request_is_the_mean_over_all_orders_of_ties():
    rng = np.random.default_rng(1)
    request = np.repeat(rng.permutation(40), rng.integers(1, 7, 40))
    logits = rng.integers(0, 3, request.size).astype(float)
    labels = rng.random(request.size) < 0.4
    weights = (rng.random(request.size) < 0.9).astype(float)
    shuffle = rng.permutation(request.size)
    want = {"auc": [], "mrr": [], "ndcg1": [], "ndcg3": [], "ndcg10": []}
    for r in np.unique(request):
        of_request = (request == r) & (weights > 0)
        x, y = logits[of_request].tolist(), labels[of_request].astype(int).tolist()
        if not 0 < sum(y) < len(y):
            continue
        want["auc"].append(reference.auc(x, y, [1] * len(y)))
        want["mrr"].append(reference.mrr(x, y))
        for k in (1, 3, 10):
            want[f"ndcg{k}"].append(reference.ndcg(x, y, k))
    assert len(want["mrr"]) > 15
    got = metrics.per_request(
        logits[shuffle], labels[shuffle], request[shuffle], weights[shuffle], ks=(1, 3, 10)
    )
    assert got == pytest.approx({k: np.mean(v) for k, v in want.items()}, abs=1e-12)


def test_progressive_curve_is_ne_of_every_prefix(rows):
    _, spoilt, labels, weights, _ = rows
    counts, curve = metrics.progressive_curve(spoilt, labels, weights, points=7)
    assert counts[-1] == labels.size and counts.size == 7
    for n, got in zip(counts, curve):
        want = metrics.normalized_entropy(spoilt[:n], labels[:n], weights[:n])
        assert got == pytest.approx(want, abs=1e-12)
    counts, curve = metrics.progressive_curve([0.0, 0, 1, 1], [0, 0, 1, 1], points=[1, 2, 3])
    assert np.isnan(curve[:2]).all() and np.isfinite(curve[2])
    _, curve = metrics.progressive_curve([0.0, 0, 1], [1, 0, 1], [0, 0, 1], points=[1, 2, 3])
    assert np.isnan(curve).all()
    with pytest.raises(ValueError, match=r"increasing in 1 \.\. 4"):
        metrics.progressive_curve([0.0] * 4, [0, 0, 1, 1], points=[2, 5])


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: metrics.auc([0.0, 1], [0, 0]), "no positives in 2 rows"),
        (lambda: metrics.auc([0.0, 1], [1, 1]), "no negatives in 2 rows"),
        (lambda: metrics.auc([0.0, 1], [1, 0], [0, 0]), "no weight"),
        (lambda: metrics.auc([], []), "0 rows"),
        (lambda: metrics.normalized_entropy([0.0, 1], [0, 0]), "no positives"),
        (lambda: metrics.normalized_entropy([0.0, 1], [0, 1], [1, 0]), "no positives in 1 rows"),
        (lambda: metrics.calibration([0.0], [0]), "no positives"),
        (lambda: metrics.log_loss([], []), "no weight"),
        (lambda: metrics.gauc([0.0, 1], [0, 1], [7, 8]), "none of 2 users"),
        (lambda: metrics.per_request([0.0, 1], [0, 1], [7, 8]), "none of 2 requests"),
    ],
)
def test_undefined_says_what_was_found(call, found):
    with pytest.raises(metrics.UndefinedMetric, match=found):
        call()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([0.0, np.nan, 1], [0, 1, 0], [1, 1, 1]), "logit of row 1 is nan"),
        (([np.nan, 0.0, 1], [0, 1, 3], [0, 1, 1]), "label of row 2 is 3.0, not 0 or 1"),
        (([0.0, 1], [0, 1], [1, -1]), "weight of row 1 is -1.0"),
        (([0.0, 1], [0, 1, 1], None), r"expected one shape \[n\]"),
    ],
)
def test_nonsense_is_refused_by_row(args, message):
    with pytest.raises(ValueError, match=message):
        metrics.auc(*args)


SCHEMA = Schema(
    tables=(Table(name="item", rows=5),),
    features=(Feature(name="item", side="item", group="item", table="item"),),
    tasks=(Task(name="click"), Task(name="like", weight="click")),
    primary_task="click",
)


def test_summarize_gives_none_and_the_reason():
    rng = np.random.default_rng(2)
    n = 400
    click = rng.integers(0, 2, n)
    labels = np.stack([click, np.zeros(n)], 1)
    weights = np.stack([np.ones(n), click], 1)
    logits = rng.normal(size=(n, 2))
    user, request = rng.integers(0, 9, n), rng.integers(0, 50, n)
    got = metrics.summarize(logits, labels, weights, user, request, SCHEMA, ks=(3,))
    args = (logits[:, 0], labels[:, 0])
    assert got["click"] == {
        "impressions": n,
        "positives": click.sum(),
        "log_loss": metrics.log_loss(*args),
        "ne": metrics.normalized_entropy(*args),
        "auc": metrics.auc(*args),
        "gauc": metrics.gauc(*args, user),
        "pcoc": metrics.calibration(*args),
        **{f"request_{k}": v for k, v in metrics.per_request(*args, request, ks=(3,)).items()},
        "undefined": {},
    }
    like = got["like"]
    assert like["impressions"] == click.sum() and like["log_loss"] > 0
    missing = {"ne", "auc", "gauc", "pcoc", "request_auc", "request_mrr", "request_ndcg3"}
    assert set(like["undefined"]) == missing and all(like[name] is None for name in missing)
    assert set(like) == set(got["click"])
    assert "no positives" in like["undefined"]["auc"]
    with pytest.raises(ValueError, match=r"expected \[n, 2\] for tasks"):
        metrics.summarize(logits[:, :1], labels[:, :1], weights[:, :1], user, request, SCHEMA)


# The alarm.


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(3)
    n = 20_000
    truth = rng.normal(-1.5, 1.2, n)
    p = 1 / (1 + np.exp(-truth))
    return truth, p, (rng.random(n) < p).astype(np.float32), rng


def test_alarm_figures_are_the_formulas(world):
    truth, p, y, rng = world
    q_logit = truth + rng.normal(0, 0.5, truth.size)
    w = rng.choice([0, 0.5, 1], truth.size)
    got = metrics.oracle_alarm(q_logit, y, p, w)
    q = 1 / (1 + np.exp(-q_logit))
    advantage = w * np.log(np.where(y > 0, q / p, (1 - q) / (1 - p)))
    se = np.sqrt((w**2 * p * (1 - p) * (truth - q_logit) ** 2).sum()) / w.sum()
    assert got.advantage_nats == pytest.approx(max(0, np.cumsum(advantage).max()), abs=1e-9)
    assert got.gap == pytest.approx(-advantage.sum() / w.sum(), abs=1e-12)
    assert got.se == pytest.approx(se, rel=1e-10)
    assert got.z == pytest.approx(got.gap / got.se, rel=1e-9)
    assert not got.alarm and got.gap > 0


def test_alarm_is_silent_for_the_oracle_and_for_what_knows_less(world):
    truth, p, y, rng = world
    for logits in (
        truth,
        truth.astype(np.float32),
        truth + rng.normal(0, 1, truth.size),
        np.full(truth.size, np.log(y.mean() / (1 - y.mean()))),  # even though it saw the rate
        np.full(truth.size, 30.0),
    ):
        found = metrics.oracle_alarm(logits, y, p)
        assert not found.alarm, found
    assert metrics.oracle_alarm(truth, y, p).z == 0


@pytest.mark.parametrize("share", [1.0, 0.02])
def test_alarm_rings_for_a_planted_label(world, share):
    truth, p, y, rng = world
    leaked = rng.random(truth.size) < share
    found = metrics.oracle_alarm(np.where(leaked, 6 * y - 3, truth), y, p)
    assert found.ville and found.alarm
    assert found.sigma and found.z < -4 and found.gap < 0


def test_ville_rule_remembers_a_leak_that_was_paid_back_later():
    y = np.r_[np.ones(40), np.ones(40)]
    logits = np.r_[np.full(40, 5.0), np.full(40, -5.0)]
    found = metrics.oracle_alarm(logits, y, 0.5)
    assert found.ville and found.gap > 0 and not found.sigma
    assert not metrics.oracle_alarm(logits[::-1], y, 0.5).ville


def test_alarm_on_labels_of_a_constant_rate_is_silent():
    """The control: labels redrawn Bernoulli(rate), a predictor that overfits the past of them."""
    rng = np.random.default_rng(4)
    y = (rng.random(5000) < 0.2).astype(float)
    seen = np.cumsum(y) - y
    rate = (seen + 0.2) / (np.arange(5000) + 1)  # predict, then train
    assert not metrics.oracle_alarm(np.log(rate / (1 - rate)), y, 0.2).alarm
    assert metrics.oracle_alarm(4 * y - 2, y, 0.2).alarm


def test_alarm_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match=r"p_true holds 1\.0"):
        metrics.oracle_alarm([0.0, 0], [0, 1], [0.5, 1.0])
    with pytest.raises(ValueError, match=r"weight 2\.0, expected at most 1"):
        metrics.oracle_alarm([0.0], [1], 0.5, [2.0])
    with pytest.raises(metrics.UndefinedMetric, match="no weight"):
        metrics.oracle_alarm([0.0], [1], 0.5, [0.0])


def test_learned_parts_finds_the_share_of_each_correlated_part():
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=(2, 500))
    b = 0.7 * a + rng.normal(size=500)
    found = metrics.learned_parts(3 + 0.5 * a + 0.2 * b, {"a": a, "b": b, "noise": noise})
    assert list(found) == ["a", "b", "noise"]
    np.testing.assert_allclose(list(found.values()), [0.5, 0.2, 0], atol=1e-12)
    with pytest.raises(ValueError, match="2 rows, expected > 3"):
        metrics.learned_parts(a[:2], {"a": a[:2], "b": b[:2], "noise": noise[:2]})


def test_no_bit_of_a_metric_depends_on_the_number_of_threads():
    """A study's rows are compared bit by bit with those of a machine with other cores."""
    rng = np.random.default_rng(0)
    n = 400_000
    x, w = rng.normal(-2, 1, n), rng.random(n)
    y = (rng.random(n) < 0.2).astype(np.float32)
    found = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            found.append(
                [f(x, y, w) for f in (metrics.calibration, metrics.log_loss, metrics.auc)]
                + [metrics.normalized_entropy(x, y, w)]
            )
    assert found[0] == found[1]
