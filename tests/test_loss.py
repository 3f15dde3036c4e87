import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import loss
from rankjax.layers import auxiliary
from rankjax.schema import Feature, Schema, Table, Task

SCHEMA = Schema(
    tables=(Table(name="item", rows=5),),
    features=(Feature(name="item", side="item", group="item", table="item"),),
    tasks=(Task(name="click"), Task(name="like", weight="click")),
    primary_task="click",
)


def batch(rng):
    logits = rng.normal(0, 3, (4, 5, 2))
    labels = rng.integers(0, 2, (4, 5, 2)).astype(np.float32)
    weights = rng.choice([0.0, 1.0, 2.5], (4, 5, 2))
    return logits, labels, weights


def test_total_is_the_weighted_mean_per_task():
    logits, labels, weights = batch(np.random.default_rng(0))
    p = 1 / (1 + np.exp(-logits))
    bce = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    click, like = (weights * bce).sum((0, 1)) / weights.sum((0, 1))
    total, parts = jax.jit(
        lambda *x: loss.multi_task(
            *x,
            {"sparsity": auxiliary.Penalty(jnp.float32(3))},
            SCHEMA,
            task_weights={"like": 0.3},
            aux_weights={"sparsity": 0.1, "unused": 1.0},
        )
    )(logits, labels, weights)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, click + 0.3 * like + 0.1 * 3, rtol=1e-6)
    want = {"task/click": click, "task/like": like, "aux/sparsity": 3}
    assert set(parts) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6)
    total, _ = loss.multi_task(*map(jnp.asarray, (logits, labels, weights)), {}, SCHEMA)
    np.testing.assert_allclose(total, click + like, rtol=1e-6)


def test_task_without_weight_is_zero_and_moves_nothing():
    logits, labels, weights = map(jnp.asarray, batch(np.random.default_rng(1)))
    weights = weights.at[..., 1].set(0)
    logits = logits.at[..., 1].set(jnp.nan)

    def total(logits):
        return loss.multi_task(logits, labels, weights, {}, SCHEMA)

    (value, parts), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    assert parts["task/like"] == 0 and value == parts["task/click"] > 0
    assert (gradient[..., 1] == 0).all()
    assert ((gradient[..., 0] != 0) == (weights[..., 0] > 0)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_are_finite_in_value_and_gradient(dtype):
    x = jnp.asarray([-1000.0, -100, 0, 100, 1000], dtype)
    for y in (0.0, 1.0):
        value = loss.binary_cross_entropy(x, jnp.float32(y))
        assert value.dtype == jnp.float32
        lean = np.asarray(x, np.float64) * (1 - 2 * y)
        np.testing.assert_allclose(value, np.logaddexp(0, lean), rtol=1e-6, atol=1e-30)
        gradient = jax.vmap(jax.grad(lambda x, y=y: loss.binary_cross_entropy(x, jnp.float32(y))))(
            x
        )
        want = 1 / (1 + np.exp(-np.asarray(x, np.float64).clip(-500, 500))) - y
        np.testing.assert_allclose(np.asarray(gradient, np.float64), want, atol=1e-6)


def test_refusals_name_what_was_found():
    logits, labels, weights = map(jnp.asarray, batch(np.random.default_rng(2)))
    with pytest.raises(ValueError, match=r"no weight for the auxiliary terms \['l0'\]"):
        aux = {"l0": auxiliary.Penalty(jnp.float32(1))}
        loss.multi_task(logits, labels, weights, aux, SCHEMA, aux_weights={"l1": 1.0})
    with pytest.raises(ValueError, match=r"task_weights names \['buy'\]"):
        loss.multi_task(logits, labels, weights, {}, SCHEMA, task_weights={"buy": 1.0})
    with pytest.raises(ValueError, match=r"expected \[R, C, 2\] for tasks"):
        loss.multi_task(logits[..., :1], labels, weights, {}, SCHEMA)
    with pytest.raises(ValueError, match=r"expected \[R, C, 2\] for tasks"):
        aux = {"head": auxiliary.Logits(logits[:, :1])}
        loss.multi_task(logits, labels, weights, aux, SCHEMA, aux_weights={"head": 1.0})
    with pytest.raises(ValueError, match=r"aux_weights names \['l1'\], expected .* \['l0'\]"):
        loss.first_weights({"l0": auxiliary.Penalty(jnp.float32(1))}, {"l1": 1.0})


def test_an_auxiliary_head_has_the_multi_task_loss_of_its_own_logits():
    logits, labels, weights = batch(np.random.default_rng(3))
    other = logits[::-1].copy()
    options = {"task_weights": {"like": 0.3}}
    aux = {"head": auxiliary.Logits(jnp.asarray(other))}
    args = labels, weights
    got, parts = loss.multi_task(
        jnp.asarray(logits), *args, aux, SCHEMA, aux_weights={"head": 0.2}, **options
    )
    main, _ = loss.multi_task(jnp.asarray(logits), *args, {}, SCHEMA, **options)
    head, _ = loss.multi_task(jnp.asarray(other), *args, {}, SCHEMA, **options)
    np.testing.assert_allclose(parts["aux/head"], head, rtol=1e-6)
    np.testing.assert_allclose(got, main + 0.2 * head, rtol=1e-6)


def test_weights_start_as_given_or_as_the_term_says():
    aux = {
        "a": auxiliary.Penalty(jnp.float32(1), 0.1),
        "b": auxiliary.Logits(jnp.zeros((1, 1, 2)), 0.5),
    }
    assert loss.first_weights(aux, {"b": 2.0}) == {"a": 0.1, "b": 2.0}


@pytest.mark.parametrize(("measured", "factor"), [(0.3, loss.ADAPT), (0.2, 1 / loss.ADAPT)])
def test_only_a_penalty_with_a_target_moves_its_weight(measured, factor):
    aux = {
        "free": auxiliary.Penalty(jnp.float32(1)),
        "held": auxiliary.Penalty(jnp.float32(1), 1.0, jnp.float32(measured), 0.25),
        "head": auxiliary.Logits(jnp.zeros((1, 1, 2))),
    }
    got = loss.adapt({name: jnp.float32(2) for name in aux}, aux)
    np.testing.assert_allclose([got["free"], got["held"], got["head"]], [2, 2 * factor, 2])
