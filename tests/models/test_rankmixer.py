"""RankMixer against float64 NumPy, its closed forms, and the configurations that it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rankjax import embedding, evaluate, flops, train
from rankjax.data import event_log, samples
from rankjax.models import rankmixer
from tests import builders, interaction, oracles, tiny
from tests.references import rankmixer as reference

SMALL = rankmixer.Config(tokens=4, layers=2, width=8, expansion=3, tasks=2)
SPARSE = dataclasses.replace(SMALL, experts=3, expansion=2, active_share=0.4)


@functools.cache
def params_of(config):
    return interaction.drawn(rankmixer.RankMixer(config), np.random.default_rng(1))


def shapes_of(config):
    return interaction.shapes(rankmixer.RankMixer(config))


def made(seed=1, **sizes):
    """A batch and its features."""
    batch = builders.batch(np.random.default_rng(seed), tasks=2, **sizes)
    return batch, builders.features(batch)


def score(config, features, params=None):
    return interaction.score(rankmixer.RankMixer(config), params or params_of(config), features)


@functools.cache
def trainer(config):
    model = rankmixer.RankMixer(config)
    return jax.jit(lambda params, features: model.apply({"params": params}, features, train=True))


def expected(config, batch, p, router="router"):
    """(logits [n, K], gates [n, L, T, X] or None) of the valid candidates, float64."""
    c = config
    how = (c.tokens, c.layers, c.pooling, c.norm, c.norm_place, router)
    found = [
        reference.logits(builders.one(batch, row, candidate), p, *how)
        for row, candidate in np.argwhere(batch.candidate_mask)
    ]
    logits, gates = zip(*found)
    return np.stack(logits), np.array(gates)


@pytest.mark.parametrize("norm_place", ["post", "pre"])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_block_is_the_papers(norm, norm_place):
    rng = np.random.default_rng(0)
    config = dataclasses.replace(SMALL, norm=norm, norm_place=norm_place)
    block = rankmixer.Block(config)
    x_tnd = rng.normal(size=(4, 5, 8)).astype("f4")
    params = params_of(config)["block_0"]
    got, gates = jax.jit(block.apply)({"params": params}, x_tnd)
    params_64 = builders.float64(params)
    want = [reference.block(x_td, params_64, norm, norm_place)[0] for x_td in x_tnd.swapaxes(0, 1)]
    np.testing.assert_allclose(got, np.stack(want, axis=1), rtol=0, atol=1e-5)
    assert gates is None


CONFIGS = {
    "dense": SMALL,
    "pre": dataclasses.replace(SMALL, norm_place="pre"),
    "without norm": dataclasses.replace(SMALL, norm="none"),
    "both poolings": dataclasses.replace(SMALL, pooling=("mean", "target"), tokens=8),
    "experts": SPARSE,
    "experts, pre": dataclasses.replace(SPARSE, norm_place="pre", norm="rms", dtsi=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_papers(name):
    config, (batch, features) = CONFIGS[name], made()
    got = score(config, features)
    want, _ = expected(config, batch, builders.float64(params_of(config)))
    np.testing.assert_allclose(got[batch.candidate_mask], want, rtol=0, atol=1e-5)
    assert got.dtype == np.float32 and np.ptp(want) > 0.5


def test_training_terms_are_the_references():
    """The sum of the gates and their share of h_infer, and the logits under h_train."""
    batch, features = made()
    p, valid = builders.float64(params_of(SPARSE)), batch.candidate_mask
    logits, aux = trainer(SPARSE)(params_of(SPARSE), features)
    want, gates_nltx = expected(SPARSE, batch, p)
    dense, dense_gates = expected(SPARSE, batch, p, router="router_train")
    np.testing.assert_allclose(logits[valid], want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(aux["dense_router"].logits[valid], dense, rtol=0, atol=1e-5)
    assert aux["dense_router"].weight == 1 and np.abs(dense - want).max() > 0.1
    penalty = aux["experts"]
    np.testing.assert_allclose(penalty.value, gates_nltx.sum(axis=-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(penalty.measured, (gates_nltx > 0).mean(), rtol=1e-6)
    assert (penalty.weight, penalty.target) == (rankmixer.GATE_WEIGHT, 0.4)
    assert abs(dense_gates.sum(axis=-1).mean() - penalty.value) > 0.01


def test_training_brings_the_active_share_to_its_target(tmp_path):
    """From more than half of the experts to 30%, by the weight that each step adapts."""
    config = rankmixer.Config(
        **{"tokens": 4, "layers": 1, "width": 8, "expansion": 1, "tasks": 2},
        **{"experts": 4, "active_share": 0.3, "dtsi": False},
    )
    log = event_log.EventLog.open(tiny.log(tmp_path / "log", requests=200, events=400))
    trained = train.TrainConfig(
        batch=64,
        tables=embedding.TableConfig(width=4, init_std=0.3),
        aux_weights=(("experts", 0.05),),
    )
    asked = samples.SampleConfig(organisation="request", history=10)
    batches = train.batches(log, trained, samples.build(log, asked, "train"))
    program = train.program(config, log.schema, trained)
    state = train.init(config, log.schema, trained, batches[0])
    first = batches[0].without_impression()
    ids = embedding.deduplicate(program.layout, first)

    @jax.jit
    def share(state):
        rows = embedding.gather(state.tables, ids)
        model = rankmixer.RankMixer(config)
        given = (model, program.layout, state.params, rows, ids, first)
        return evaluate.apply(*given, train=True)[1]["experts"].measured

    before = float(share(state))
    rates = {"dense": np.float32(1e-2), "tables": np.float32(0.1), "biases": np.float32(0.1)}
    for step in range(250):
        batch = batches[step % len(batches)].without_impression()
        state, _ = program.step(state, batch, rates, jax.random.key(step))
    assert before > 0.5 and share(state) == pytest.approx(0.3, abs=0.05)


def test_which_terms_there_are():
    def terms(train=True, **change):
        config = dataclasses.replace(SPARSE, **change)
        apply = functools.partial(rankmixer.RankMixer(config).apply, train=train)
        features = jax.eval_shape(lambda: made()[1])
        return set(jax.eval_shape(apply, {"params": shapes_of(config)}, features)[1])

    assert terms() == {"experts", "dense_router"}
    assert terms(dtsi=False) == {"experts"}
    assert terms(experts=1) == terms(train=False) == set()


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_gradients_are_the_references(config):
    """Of logits and of every training term, in every parameter and every input."""
    rng = np.random.default_rng(1)
    batch, features = made(lengths=(3, 0), candidates=(2, 1), S=4, C=2)
    valid = batch.candidate_mask
    weight = rng.normal(size=(2, *valid.shape, 2)) * valid[..., None]

    def loss(at):
        given = dataclasses.replace(features, **at["inputs"])
        logits, aux = trainer(config)(at["params"], given)
        total = (weight[0] * logits).sum()
        if config.experts > 1:
            total += 5 * aux["experts"].value + (weight[1] * aux["dense_router"].logits).sum()
        return total

    def in_float64(at):
        given, p = dataclasses.replace(batch, **at["inputs"]), at["params"]
        logits, gates_nltx = expected(config, given, p)
        total = (weight[0][valid] * logits).sum()
        if config.experts > 1:
            dense, _ = expected(config, given, p, router="router_train")
            total += 5 * gates_nltx.sum(axis=-1).mean() + (weight[1][valid] * dense).sum()
        return total

    sides = {side: getattr(batch, side) for side in ("user", "history", "candidate")}
    at = {"params": params_of(config), "inputs": sides}
    oracles.gradients(loss, in_float64, at, rng, tolerance=1e-5)


def test_each_router_is_trained_by_its_own_terms():
    _, features = made(lengths=(3, 0), candidates=(2, 1), S=4, C=2)

    @jax.jit
    @jax.grad
    def gradient(params, weight):
        logits, aux = trainer(SPARSE)(params, features)
        terms = logits.sum(), aux["experts"].value, aux["dense_router"].logits.sum()
        return sum(w * term for w, term in zip(weight, terms))

    def moved(term):
        found = gradient(params_of(SPARSE), np.eye(3, dtype="f4")[term])["block_0"]
        return {name for name, g in found.items() if any(np.any(x) for x in jax.tree.leaves(g))}

    shared = {"mix_norm", "ffn_norm", "ffn"}
    assert moved(0) == shared | {"router"}
    assert moved(1) == shared | {"router"}  # block 1's gates read block 0's output
    assert moved(2) == shared | {"router_train"}


def test_scoring_needs_no_training_router():
    _, features = made()
    served = {
        name: {k: x for k, x in part.items() if k != "router_train"}
        for name, part in params_of(SPARSE).items()
    }
    assert builders.count(served) < builders.count(params_of(SPARSE))
    want = score(SPARSE, features)
    np.testing.assert_array_equal(score(SPARSE, features, served), want)


def test_one_open_gate_is_the_dense_model():
    """A router that gives expert 0 a gate of 1 and closes the others, whatever the token."""
    _, features = made()
    first, params = {}, {}
    for name, part in params_of(SPARSE).items():
        params[name] = first[name] = part
        if name.startswith("block"):
            bias = np.where(np.arange(3) == 0, 1, -1) + np.zeros((4, 3), "f4")
            router = {"kernel": np.zeros_like(part["router"]["kernel"]), "bias": bias}
            params[name] = part | {"router": router}
            norms = {k: x for k, x in part.items() if k.endswith("norm")}
            first[name] = norms | {"ffn": jax.tree.map(lambda x: x[:, 0], part["ffn"])}
    logits, aux = trainer(SPARSE)(params, features)
    want = score(dataclasses.replace(SPARSE, experts=1), features, first)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-6)
    penalty = aux["experts"]
    np.testing.assert_allclose([penalty.value, penalty.measured], [1, 1 / 3], rtol=1e-6)


def test_padding_and_packing_leave_the_terms_alone():
    batch, features = made()
    rng, valid = np.random.default_rng(2), batch.candidate_mask[..., None]
    dirty = {
        k: np.where(valid, x, 9 * rng.normal(size=x.shape)).astype("f4")
        for k, x in batch.candidate.items()
    }
    want_logits, want = trainer(SPARSE)(params_of(SPARSE), features)
    changed = builders.features(dataclasses.replace(batch, candidate=dirty))
    for given in (changed, builders.packed(batch, 2)):
        logits, got = trainer(SPARSE)(params_of(SPARSE), given)
        for name in ("value", "measured"):
            a, b = getattr(got["experts"], name), getattr(want["experts"], name)
            np.testing.assert_allclose(a, b, rtol=1e-5)
        dense, want_dense = got["dense_router"].logits, want["dense_router"].logits
        for a, b in ((logits, want_logits), (dense, want_dense)):
            interaction.close(np.reshape(a, b.shape), np.asarray(b), batch.candidate_mask)


def test_a_batch_without_candidates_has_terms_of_zero():
    with jax.disable_jit():  # XLA's CPU compiler takes False / 0 for 0, others need not
        term = rankmixer._usage(jnp.ones((1, 4, 2, 3)), jnp.zeros(2, bool), 0.4)
    assert (float(term.value), float(term.measured)) == (0, 0)


def test_bfloat16_is_finite_and_near():
    _, features = made()
    half = dataclasses.replace(SPARSE, dtype="bfloat16")
    logits, aux = trainer(half)(params_of(SPARSE), features)
    want, terms = trainer(SPARSE)(params_of(SPARSE), features)
    assert logits.dtype == aux["dense_router"].logits.dtype == jnp.float32
    for a, b in ((logits, want), (aux["dense_router"].logits, terms["dense_router"].logits)):
        assert 1e-4 < np.abs(a - b).max() < 0.05 * np.abs(b).max()
    assert aux["experts"].value.dtype == jnp.float32
    np.testing.assert_allclose(aux["experts"].value, terms["experts"].value, rtol=0.01)


def test_routers_compute_in_float32():
    """bfloat16 would round the gate of 1.001 to 1."""
    block = rankmixer.Block(dataclasses.replace(SPARSE, dtype="bfloat16"))
    bias = np.full((4, 3), 1.001, "f4")
    params = params_of(SPARSE)["block_0"]
    params = params | {"router": {"kernel": np.zeros((4, 8, 3), "f4"), "bias": bias}}
    y_tnd, gate_tnx = jax.jit(block.apply)({"params": params}, jnp.ones((4, 2, 8), jnp.bfloat16))
    assert y_tnd.dtype == jnp.bfloat16
    np.testing.assert_allclose(gate_tnx, 1.001, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "rms"},
        {"norm": "none"},
        {"experts": 3},
        {"experts": 3, "dtsi": False, "norm": "rms"},
    ],
)
def test_paper_params_is_the_count_of_the_blocks(change):
    config = dataclasses.replace(SMALL, **change)
    blocks = [shapes_of(config)[f"block_{i}"] for i in range(config.layers)]
    assert builders.count(blocks) == config.paper_params()


def test_paper_params_and_flops_of_the_papers_sizes():
    def at(config, k):
        return dataclasses.replace(config, expansion=k).paper_params()

    small, large = rankmixer.RANKMIXER_100M, rankmixer.RANKMIXER_1B
    assert [at(small, k) for k in (2, 3, 4)] == [75_577_344, 113_350_656, 151_123_968]
    assert [at(large, k) for k in (2, 3, 4)] == [604_286_976, 906_375_168, 1_208_463_360]
    assert (small.expansion, large.expansion) == (3, 4)
    assert small.paper_flops() == 4 * 3 * 2 * 16 * 768**2


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_a_block_multiplies_as_often_as_the_closed_form_says(config):
    block, N = rankmixer.Block(config), 5
    x_tnd = jax.ShapeDtypeStruct((config.tokens, N, config.width), jnp.float32)
    params = {"params": shapes_of(config)["block_0"]}
    one_layer = dataclasses.replace(config, layers=1)
    assert flops.count(block.apply, params, x_tnd).matmul == N * one_layer.paper_flops()


def test_training_counts_the_blocks_once_for_each_router():
    features = jax.eval_shape(lambda: made()[1])

    def products(train):
        apply = functools.partial(rankmixer.RankMixer(SPARSE).apply, train=train)
        return flops.count(apply, {"params": shapes_of(SPARSE)}, features).matmul

    candidates, heads = features.candidate_sample.size, 2 * 8 * 2
    assert products(True) - products(False) == candidates * (SPARSE.paper_flops() + heads)


def test_dense_parameters_outside_the_blocks():
    """Even split: T slices of the 30 wide inputs, and the heads."""
    params = shapes_of(SMALL)
    width = 4 + 1 + (4 + 1 + 4) + 4 + (4 + 1 + 4 + 4)
    assert builders.count(params["tokenizer"]) == 4 * (-(-width // 4) * 8 + 8)
    assert builders.count(params["heads"]) == 8 * 2 + 2
    assert set(params) == {"tokenizer", "heads", "block_0", "block_1"}


def test_small_residual_divides_only_what_writes_to_the_residual():
    def initial(init):
        block = rankmixer.Block(dataclasses.replace(SMALL, init=init))
        return block.init(jax.random.key(0), jnp.zeros((4, 1, 8)))["params"]["ffn"]

    small, lecun = initial("small_residual"), initial("lecun")
    np.testing.assert_array_equal(small["ffn_in"]["kernel"], lecun["ffn_in"]["kernel"])
    np.testing.assert_allclose(
        small["ffn_out"]["kernel"], lecun["ffn_out"]["kernel"] / 2, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [("per_feature", 10), ("group", None), ("auto_split", 5)],
)
def test_every_tokenizer(tokenizer, tokens):
    config = dataclasses.replace(SMALL, tokenizer=tokenizer, tokens=tokens, width=20)
    batch, features = made()
    logits = score(config, features)
    alone = score(config, builders.packed(batch, 2)).reshape(logits.shape)
    valid = batch.candidate_mask
    assert logits.shape == (4, 4, 2) and np.isfinite(logits).all()
    assert np.unique(logits[valid]).size == 2 * valid.sum()
    np.testing.assert_allclose(alone[valid], logits[valid], rtol=0, atol=1e-5)


def test_a_token_count_that_the_schema_contradicts_is_refused():
    with pytest.raises(ValueError, match="tokens=5, but tokenizer='group' makes 4 tokens"):
        shapes_of(dataclasses.replace(SMALL, tokenizer="group", tokens=5, width=20))


def test_a_width_that_the_schemas_tokens_do_not_divide_is_refused():
    match = r"rankmixer: width=24 is no multiple of tokens=10.*20 and 30"
    with pytest.raises(ValueError, match=match):
        shapes_of(dataclasses.replace(SMALL, tokenizer="per_feature", tokens=None, width=24))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 10}, "width=10 is no multiple of tokens=4"),
        ({"tokens": 0}, "tokens=0, expected an integer >= 1"),
        ({"tokens": None}, "tokens=None, expected a number with tokenizer='even_split'"),
        ({"tokenizer": "split"}, "tokenizer='split', expected one of"),
        ({"layers": 0}, "layers=0"),
        ({"expansion": 1.5}, "expansion=1.5"),
        ({"experts": 0}, "experts=0, expected an integer >= 1"),
        ({"active_share": 0}, "active_share=0, expected 0 < share <= 1"),
        ({"active_share": 1.5}, "active_share=1.5, expected 0 < share <= 1"),
        ({"dtsi": "yes"}, "dtsi='yes', expected True or False"),
        ({"tasks": 0}, "tasks=0"),
        ({"pooling": ()}, r"pooling=\(\)"),
        ({"pooling": ("max",)}, "pooling='max'"),
        ({"attention_hidden": (0,)}, r"attention_hidden\[0\]=0"),
        ({"attention_activation": "relu"}, "attention_activation='relu'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_place": "both"}, "norm_place='both'"),
        ({"init": "he"}, "init='he'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"tokenizer_hidden": -1}, "tokenizer_hidden=-1"),
    ],
)
def test_a_bad_config_is_refused(change, match):
    with pytest.raises(ValueError, match="rankmixer.Config: " + match):
        dataclasses.replace(SMALL, **change)


def test_sizes_that_the_data_decide_have_no_closed_form():
    config = rankmixer.Config(tokens=None, tokenizer="group")
    assert config.paper_params() is None and config.paper_flops() is None


@pytest.mark.parametrize("config", [SMALL, SPARSE], ids=["dense", "experts"])
def test_a_config_goes_to_json_and_back(config):
    text = json.dumps(dataclasses.asdict(config))
    assert rankmixer.Config(**json.loads(text)) == config


def test_windows_are_refused():
    _, features = made(one_time=False)
    with pytest.raises(ValueError, match=r"rankmixer: .* different times"):
        rankmixer.RankMixer(SMALL).init(jax.random.key(0), features, train=False)
