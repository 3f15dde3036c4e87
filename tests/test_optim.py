import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rankjax import optim
from rankjax.layers import stack

PLAIN = optim.OptimConfig(learning_rate=0.1, warmup=0.0, schedule="constant", clip=None)


def steps(config, params, gradients, total_steps=10):
    """The parameters after each gradient."""
    chain = optim.make(config, total_steps)
    state = chain.init(params)
    path = []
    for gradient in gradients:
        updates, state = jax.jit(chain.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", lambda p, i: 1.0),
        ("linear", lambda p, i: 1 - 0.8 * p),
        ("cosine", lambda p, i: 0.2 + 0.8 * (1 + math.cos(math.pi * p)) / 2),
        ("inverse_sqrt", lambda p, i: max(0.2, math.sqrt(20 / (i + 1)))),
    ],
)
def test_multiplier_by_hand(schedule, after):
    config = optim.OptimConfig(warmup=0.1, schedule=schedule, final=0.2, learning_rate=3.0)
    share, rate = optim.multiplier(config, 200), optim.schedule(config, 200)
    got = np.asarray([share(i) for i in range(220)])
    want = [(i + 1) / 20 if i < 20 else after(min((i - 20) / 180, 1), i) for i in range(220)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.max() == 1 and got.min() > 0
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(57)), 3 * want[57], rtol=1e-5)


def test_multiplier_of_no_warm_up_and_of_one_step():
    config = dataclasses.replace(PLAIN, schedule="inverse_sqrt")
    np.testing.assert_allclose([optim.multiplier(config, 9)(i) for i in (0, 3)], [1, 0.5])
    for warmup in (0.0, 1.0):
        config = dataclasses.replace(PLAIN, schedule="cosine", warmup=warmup)
        assert optim.multiplier(config, 1)(0) == 1
    with pytest.raises(ValueError, match="total_steps=0"):
        optim.multiplier(config, 0)


def test_first_two_steps_of_each_optimizer_by_hand():
    params, gradients = (
        {"kernel": jnp.array([1.0])},
        [{"kernel": jnp.array([g])} for g in (2.0, -1.0)],
    )

    def moves(**change):
        config = dataclasses.replace(PLAIN, b1=0.5, b2=0.75, eps=0.01, **change)
        first, second = (float(p["kernel"][0]) for p in steps(config, params, gradients))
        return 1 - first, first - second

    m1, v1 = 2.0, 4.0  # bias-corrected averages after one gradient
    m2 = (0.5 * (0.5 * 2) + 0.5 * -1) / (1 - 0.5**2)
    v2 = (0.75 * (0.25 * 4) + 0.25 * 1) / (1 - 0.75**2)
    adam = (0.1 * m1 / (math.sqrt(v1) + 0.01), 0.1 * m2 / (math.sqrt(v2) + 0.01))
    np.testing.assert_allclose(moves(), adam, rtol=1e-5)
    decayed = (adam[0] + 0.1 * 0.3, adam[1] + 0.1 * 0.3 * (1 - adam[0] - 0.1 * 0.3))
    np.testing.assert_allclose(moves(optimizer="adamw", weight_decay=0.3), decayed, rtol=1e-5)
    r1, r2 = 0.25 * 4, 0.75 * (0.25 * 4) + 0.25 * 1
    rms = (0.1 * 2 / (math.sqrt(r1) + 0.01), 0.1 * -1 / (math.sqrt(r2) + 0.01))
    np.testing.assert_allclose(moves(optimizer="rmsprop"), rms, rtol=1e-5)
    adagrad = (0.1 * 2 / math.sqrt(4 + 0.01), 0.1 * -1 / math.sqrt(5 + 0.01))
    np.testing.assert_allclose(moves(optimizer="adagrad"), adagrad, rtol=1e-5)


def test_schedule_scales_the_steps_and_not_the_moments():
    """Adam under a constant gradient moves by exactly the scheduled rate, step after step."""
    config = dataclasses.replace(PLAIN, schedule="linear", warmup=0.2, eps=1e-12)
    params = {"kernel": jnp.zeros(3)}
    path = steps(config, params, [{"kernel": jnp.full(3, -7.0)}] * 10, total_steps=10)
    moved = np.diff([0.0] + [float(p["kernel"][1]) for p in path])
    np.testing.assert_allclose(
        moved, [float(optim.schedule(config, 10)(i)) for i in range(10)], rtol=1e-4
    )


def test_clip_is_by_the_norm_of_all_leaves_together():
    config = dataclasses.replace(PLAIN, optimizer="adagrad", clip=1.0, eps=1.0)
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    params = jax.tree.map(jnp.zeros_like, gradient)
    (after,) = steps(config, params, [gradient])
    for name, clipped in (("a", 0.6), ("b", 0.8)):
        np.testing.assert_allclose(
            after[name], -0.1 * clipped / math.sqrt(clipped**2 + 1), rtol=1e-5
        )


def test_decay_spares_biases_and_scales():
    params = {"ffn": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    config = dataclasses.replace(PLAIN, optimizer="adamw", weight_decay=0.5)
    (after,) = steps(config, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(after["ffn"]["kernel"], 0.95)
    assert (after["ffn"]["bias"] == 1).all() and (after["norm"]["scale"] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0, expected > 0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"final": -0.1}, "final=-0.1"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"b2": 1.0}, "b2=1.0"),
        ({"weight_decay": 0.1}, "expected 'adamw'"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        optim.OptimConfig(**change)


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_stacked_layers_move_as_layers_one_by_one(optimizer):
    """Clipped by one norm of all; a stacked bias has two axes and is not decayed either."""
    rng = np.random.default_rng(0)

    def draw():
        shapes = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "own": (2, 3, 3)}
        layer = lambda: {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
        return {name: layer() for name in ("layer_0", "layer_1", "layer_2", "head")}

    decay = 0.5 if optimizer == "adamw" else 0.0
    config = dataclasses.replace(PLAIN, optimizer=optimizer, weight_decay=decay, clip=1.0)
    params, gradients = draw(), [draw() for _ in range(3)]
    put = lambda tree: stack.stacked(tree, ["layer_stack_0_2"])
    got = steps(config, put(params), list(map(put, gradients)))
    want = steps(config, params, gradients)
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, list(map(put, want)))
    kept = optim.decays(put(params))["layer_stack_0_2"]
    assert kept == {"kernel": True, "bias": False, "scale": False, "own": True}
