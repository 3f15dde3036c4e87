"""The four tokenizers against NumPy, their parameter counts, and token counts that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax.layers import tokenizers
from rankjax.layers.inputs import Input
from tests import builders
from tests.references import din, rankmixer

D = 6


def made(rng):
    """Inputs of 4, 1, 4 and 2 columns in three groups, R = 2, C = 3."""
    sizes = {"user.age": ("user", 4), "user.spend": ("user", 1), "candidate.item": ("item", 4)}
    sizes["history_mean.item"] = ("history", 2)
    return [
        Input(name, group, jnp.asarray(rng.normal(size=(2, 3, width)), jnp.float32), width == 1)
        for name, (group, width) in sizes.items()
    ]


def run(kind, tokens, hidden=0, dtype="float32", dense_tokens=0):
    """The inputs [R * C, W] by name, float64 parameters, and the tokens [T, R * C, D]."""
    rng = np.random.default_rng(0)
    inputs = made(rng)
    module = tokenizers.Tokenizer(kind, tokens, D, hidden, dtype=dtype, dense_tokens=dense_tokens)
    params = builders.moved(module.init(jax.random.key(0), inputs)["params"], rng)
    x = {i.name: np.asarray(i.value, np.float64).reshape(6, -1) for i in inputs}
    return x, builders.float64(params), module.apply({"params": params}, inputs)


def test_per_feature():
    x, p, got = run("per_feature", None)
    want = np.stack([din.dense(x[name], p[name]) for name in x])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert builders.count(p) == (4 + 1 + 4 + 2) * D + 4 * D


def two_dense(rng):
    """As `made`, with a second dense input before the history."""
    x = jnp.asarray(rng.normal(size=(2, 3, 1)), jnp.float32)
    return [*made(rng)[:3], Input("candidate.price", "item", x, dense=True), made(rng)[3]]


@pytest.mark.parametrize("n_d", [1, 3])
def test_per_feature_with_tokens_of_all_dense_inputs_together(n_d):
    rng = np.random.default_rng(0)
    inputs = two_dense(rng)
    module = tokenizers.Tokenizer("per_feature", 3 + n_d, D, dense_tokens=n_d)
    params = builders.moved(module.init(jax.random.key(0), inputs)["params"], rng)
    p, got = builders.float64(params), module.apply({"params": params}, inputs)
    x = {i.name: np.asarray(i.value, float).reshape(6, -1) for i in inputs}
    wide = ("user.age", "candidate.item", "history_mean.item")
    for t, name in enumerate(wide):
        np.testing.assert_allclose(got[t], din.dense(x[name], p[name]), atol=1e-5)
    dense = np.concatenate([x["user.spend"], x["candidate.price"]], axis=1)
    want = din.dense(dense, p["dense"]).reshape(6, n_d, D).swapaxes(0, 1)
    np.testing.assert_allclose(got[3:], want, atol=1e-5)
    assert builders.count(p) == (4 + 4 + 2) * D + 3 * D + n_d * (2 * D + D)


def test_dense_tokens_are_counted_where_there_are_dense_inputs():
    inputs = two_dense(np.random.default_rng(0))
    assert tokenizers.count("per_feature", inputs, None, 4) == 3 + 4
    assert tokenizers.count("per_feature", inputs, None, 0) == 5
    wide, dense = tokenizers.split_dense(inputs)
    assert [x.name for x in dense] == ["user.spend", "candidate.price"]
    narrow = Input("user.sex", "user", jnp.zeros((2, 3, 1)))
    assert tokenizers.split_dense([narrow]) == ([narrow], [])  # an embedding, however narrow
    assert tokenizers.count("per_feature", wide, None, 4) == 3
    assert tokenizers.count("group", inputs, None, 4) == 3
    with pytest.raises(ValueError, match=r"tokens=5, but tokenizer='per_feature' makes 7 tokens"):
        tokenizers.count("per_feature", inputs, 5, 4)
    module = tokenizers.Tokenizer("per_feature", None, D, dense_tokens=4)
    got, variables = module.init_with_output(jax.random.key(0), wide)
    assert got.shape == (3, 6, D) and "dense" not in variables["params"]


def test_task_tokens_stand_before_the_others_and_are_all_candidates():
    rng = np.random.default_rng(0)
    x_tnd, module = rng.normal(size=(3, 5, D)).astype("f4"), tokenizers.TaskTokens(2)
    params = builders.moved(module.init(jax.random.key(0), x_tnd)["params"], rng)
    got = module.apply({"params": params}, x_tnd)
    np.testing.assert_array_equal(got[2:], x_tnd)
    for n in range(5):
        np.testing.assert_array_equal(got[:2, n], params["tokens"])
    assert module.apply({"params": params}, x_tnd.astype("bfloat16")).dtype == jnp.bfloat16


GROUPS = {
    "user": ("user.age", "user.spend"),
    "item": ("candidate.item",),
    "history": ("history_mean.item",),
}


def test_group_linear():
    x, p, got = run("group", 3)
    for t, (group, names) in enumerate(GROUPS.items()):
        want = din.dense(np.concatenate([x[n] for n in names], axis=1), p[group])
        np.testing.assert_allclose(got[t], want, atol=1e-5)
    assert builders.count(p) == (5 + 4 + 2) * D + 3 * D


def test_group_with_a_hidden_layer():
    x, p, got = run("group", None, hidden=5)
    for t, (group, names) in enumerate(GROUPS.items()):
        x_nw = np.concatenate([x[n] for n in names], axis=1)
        want = din.dense(np.maximum(din.dense(x_nw, p[f"{group}.hidden"]), 0), p[group])
        np.testing.assert_allclose(got[t], want, atol=1e-5)
    assert builders.count(p) == (5 + 4 + 2) * 5 + 3 * 5 + 3 * (5 * D + D)


@pytest.mark.parametrize("T", [1, 3, 4, 11])
def test_even_split(T):
    x, p, got = run("even_split", T)
    for n, x_w in enumerate(np.concatenate(list(x.values()), axis=1)):
        want = rankmixer.even_split(x_w, T, p["slices"])
        np.testing.assert_allclose(got[:, n], want, atol=1e-5)
    assert builders.count(p) == T * (-(-11 // T) * D + D)


@pytest.mark.parametrize("hidden", [0, 5])
def test_auto_split(hidden):
    x, p, got = run("auto_split", 4, hidden)
    x_nw = np.concatenate(list(x.values()), axis=1)
    if hidden:
        x_nw = np.maximum(din.dense(x_nw, p["all.hidden"]), 0)
    want = din.dense(x_nw, p["all"]).reshape(6, 4, D).swapaxes(0, 1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert builders.count(p) == (11 * 5 + 5 if hidden else 0) + ((hidden or 11) + 1) * 4 * D


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_computes_in_dtype(kind):
    _, _, got = run(kind, None if kind in tokenizers.FROM_DATA else 4, dtype="bfloat16")
    assert got.dtype == jnp.bfloat16 and got.shape[1:] == (6, D)


def test_token_counts_that_do_not_fit_are_refused():
    inputs = made(np.random.default_rng(0))
    assert tokenizers.count("per_feature", inputs, None) == 4
    assert tokenizers.count("group", inputs, 3) == 3
    assert tokenizers.count("even_split", inputs, 8) == 8
    with pytest.raises(ValueError, match=r"tokens=8, but tokenizer='per_feature' makes 4 tokens"):
        tokenizers.count("per_feature", inputs, 8)
    with pytest.raises(ValueError, match="tokens=12, but the inputs are 11 wide"):
        tokenizers.count("even_split", inputs, 12)


def test_bad_settings_are_refused():
    tokenizers.check("a.Config", "group", None)
    with pytest.raises(ValueError, match=r"a.Config: tokenizer='x'"):
        tokenizers.check("a.Config", "x", 4)
    with pytest.raises(ValueError, match=r"a.Config: tokens=None"):
        tokenizers.check("a.Config", "auto_split", None)
    with pytest.raises(ValueError, match=r"a.Config: tokens=0"):
        tokenizers.check("a.Config", "group", 0)
