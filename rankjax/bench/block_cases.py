"""What `rankjax bench models` times: one block of every architecture, with all that goes into it.

A case also says which function of experiments/peers/torch_layers.py computes the same equations,
and what that function is given beside the parameters and the inputs: masks and look-up indices,
which a model makes once for all of its layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from rankjax.batch import Features, Tokens
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.layers import feed_forward, history_pooling, sequence, transformer_block
from rankjax.masks import MaskRule
from rankjax.models import (
    autoint,
    dcnv2,
    din,
    dlrm,
    dlrm_v3,
    grab,
    hhft,
    hiformer,
    hstu,
    longer,
    mtgr,
    onetrans,
    rankmixer,
    tokenmixer_large,
    transformer,
    wukong,
)
from rankjax.schema import Feature, Schema, Table, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """N candidates of T feature tokens; R rows of S events and C candidates; D wide, H heads."""

    candidates: int  # N
    tokens: int  # T
    rows: int  # R
    history: int  # S
    listed: int  # C
    width: int  # D
    heads: int = 2  # H


SIZES = {
    # What studies on two cores use, and one where matrix products take most of the time.
    "small": Size(candidates=512, tokens=8, rows=16, history=50, listed=8, width=32),
    "large": Size(candidates=512, tokens=16, rows=16, history=111, listed=16, width=64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A block, ready to be called: apply(params, floats, given) -> float32 array.

    floats: inputs that gradients are taken of, beside params. given: all other inputs.
    peer: the function of torch_layers.py, called with the parameters by path and the floats, and
      with arrays and options by name.
    """

    apply: Callable[[Any, tuple[jax.Array, ...], Any], jax.Array]
    params: Any
    floats: tuple[np.ndarray, ...]
    given: Any
    peer: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by their path, as in "ffn/ffn_in/kernel"."""
    return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(params, sep="/").items()}


def random_params(shapes: Any, rng: np.random.Generator) -> Any:
    """Of the size that initialisers give, and none at 0 or 1, so that a forgotten one is seen."""

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        x = rng.normal(size=shape).astype(np.float32)
        if path[-1] == "scale":
            return 1 + 0.1 * x
        return 0.1 * x if len(shape) < 2 or path[-1] == "bias" else x / np.float32(shape[-2] ** 0.5)

    found = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({k: draw(k, x.shape) for k, x in found.items()})


def _case(
    peer: str,
    module: nn.Module,
    floats: tuple[np.ndarray, ...],
    call: Callable[..., Any] | None = None,
    given: Any = None,
    arrays: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """call(module, floats, given) -> the block's output; None: module(*floats)."""
    call = call or (lambda m, floats, given: m(*floats))
    init = lambda key: module.init(key, floats, given, method=call)["params"]
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    return Case(
        apply=lambda params, floats, given: module.apply(
            {"params": params}, floats, given, method=call
        ),
        params=random_params(shapes, np.random.default_rng(1)),
        floats=floats,
        given=given,
        peer=peer,
        arrays={k: np.asarray(x) for k, x in (arrays or {}).items()},
        options=options,
    )


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).normal(size=shape).astype(np.float32)


# --- feature interaction: token-major [T, N, D], or all inputs side by side [N, W] ------------


def _tokens(s: Size) -> np.ndarray:
    return _normal(s.tokens, s.candidates, s.width)


def _mlp(s: Size) -> Case:
    widths = (4 * s.width, 4 * s.width)
    x_nw = _normal(s.candidates, s.tokens * s.width)
    return _case("mlp", feed_forward.MLP(widths), (x_nw,), layers=len(widths))


def _dots(s: Size) -> Case:
    def call(m: nn.Module, floats: tuple[jax.Array, ...], given: Any) -> jax.Array:
        (x_vnd,) = floats
        return m(jnp.concatenate([x_vnd[0], dlrm.dots(x_vnd)], axis=-1))

    top = feed_forward.MLP((4 * s.width, 4 * s.width))
    return _case("dots", top, (_tokens(s),), call, layers=2)


def _cross(s: Size) -> Case:
    x0, x = _normal(2, s.candidates, s.tokens * s.width)
    return _case("cross", dcnv2.Cross(dcnv2.Config(rank=s.width)), (x0, x))


def _target_attention(s: Size, activation: str) -> Case:
    found = features(s)
    reads_rcs = np.asarray(history_pooling.same_sample(found))

    def call(m: nn.Module, floats: tuple[jax.Array, ...], reads_rcs: jax.Array) -> jax.Array:
        return jnp.einsum("rcs,rsw->rcw", m(*floats, reads_rcs), floats[0])

    floats = (_normal(s.rows, s.history, s.width + 8), _normal(s.rows, s.listed, s.width))
    module = history_pooling.TargetAttention((36,), activation)
    return _case("target_attention", module, floats, call, reads_rcs, {"reads": reads_rcs})


def _din_layer(s: Size) -> Case:
    x_nw = _normal(s.candidates, s.tokens * s.width)
    return _case("dice_layer", din.Layer(din.Config(width=4 * s.width)), (x_nw,))


def _autoint(s: Size) -> Case:
    layer = autoint.Layer(autoint.Config(width=s.width, heads=s.heads))
    return _case("autoint", layer, (_tokens(s),), heads=s.heads)


def _wukong(s: Size) -> Case:
    config = wukong.Config(width=s.width, hidden=4 * s.width)
    return _case("wukong", wukong.Layer(config), (_tokens(s),))


def _transformer(s: Size) -> Case:
    block = transformer.Block(transformer.Config(width=s.width, heads=s.heads))
    return _case("transformer", block, (_tokens(s),), heads=s.heads)


def _heteroatt(s: Size) -> Case:
    config = hiformer.HeteroAttConfig(width=s.width, heads=s.heads)
    return _case("heteroatt", hiformer.Block(config, s.tokens), (_tokens(s),), heads=s.heads)


def _hiformer(s: Size) -> Case:
    config = hiformer.HiformerConfig(width=s.width, heads=s.heads)
    return _case("hiformer", hiformer.Block(config, s.tokens), (_tokens(s),), heads=s.heads)


def _hhft(s: Size) -> Case:
    config = hhft.Config(width=s.width, heads=s.heads, virtual_tokens=s.tokens)
    x_nw = _normal(s.candidates, s.width)
    return _case("hhft", hhft.HiformerLayer(config), (x_nw,), heads=s.heads, tokens=s.tokens)


def _rankmixer(s: Size) -> Case:
    block = rankmixer.Block(rankmixer.Config(tokens=s.tokens, width=s.width))
    return _case("rankmixer", block, (_tokens(s),), lambda m, floats, given: m(*floats)[0])


def _tokenmixer_large(s: Size) -> Case:
    config = tokenmixer_large.Config(tokens=s.tokens, width=s.width)
    return _case("tokenmixer_large", tokenmixer_large.Block(config), (_tokens(s),))


# --- sequences: [R, N, D], masked by what is known of the tokens ------------------------------


def features(s: Size) -> Features:
    """R requests of C candidates; the histories' lengths fall from S to about S / 2."""
    tables = (Table(name="item", rows=2), Table(name="age", rows=2), Table(name="action", rows=2))
    found = (
        Feature(name="age", side="user", group="user", table="age"),
        Feature(name="item", side="item", group="item", table="item"),
        Feature(name="action", side="event", group="action", table="action", action=True),
    )
    R, S, C, E = s.rows, s.history, s.listed, s.width
    rng = np.random.default_rng(2)
    lengths_r1 = S - (np.arange(R) * S // (2 * R))[:, None]
    valid_rs, slot_s = np.arange(S) < lengths_r1, np.arange(S, dtype=np.int32)
    zero_rc = jnp.zeros((R, C), jnp.int32)
    order_rs = np.where(valid_rs, slot_s - lengths_r1, 0).astype(np.int32)
    candidate = rng.normal(size=(R, C, E)).astype(np.float32)
    history = {n: rng.normal(size=(R, S, E)).astype(np.float32) for n in ("item", "action")}
    return Features(
        user={"age": jnp.asarray(rng.normal(size=(R, 1, E)).astype(np.float32))},
        history={name: jnp.asarray(x) for name, x in history.items()},
        candidate={"item": jnp.asarray(candidate)},
        history_sample=jnp.where(valid_rs, 0, -1),
        candidate_sample=zero_rc,
        history_time=jnp.asarray(order_rs * 3600),
        candidate_time=zero_rc,
        history_order=jnp.asarray(order_rs),
        candidate_order=zero_rc,
        history_action=jnp.asarray(np.where(valid_rs, rng.integers(1, 4, (R, S)), 0)),
        schema=Schema(
            tables=tables, features=found, tasks=(Task(name="click"),), primary_task="click"
        ),
        one_time=True,
    )


def _first(masks: dict[str, tuple[Tokens, Tokens, MaskRule]]) -> tuple[Tokens, Tokens, MaskRule]:
    return next(iter(masks.values()))


def _hstu(s: Size) -> Case:
    config, found = hstu.Config(history=s.history, width=s.width, heads=s.heads), features(s)
    q, k, rule = _first(hstu.masks_of(config, found))
    n = config.static_max(1)
    arrays = {"allow": rule.allow(q, k), "bucket": bias_lib.time_bucket(q, k)}
    apart_rnm = k.position[:, None, :] - q.position[:, :, None] + n - 1
    arrays["apart"] = np.clip(apart_rnm, 0, 2 * n - 2)
    return _case(
        "hstu",
        hstu.Layer(config, n, time_bias=True),
        (_normal(*k.role.shape, s.width),),
        lambda m, floats, given: m(*floats, (*given, rule), float(n), train=False),
        (q, k),
        arrays,
        heads=s.heads,
        n=n,
    )


def _dlrm_v3(s: Size) -> Case:
    config, found = dlrm_v3.Config(history=s.history, width=s.width, heads=s.heads), features(s)
    q, k, rule = _first(dlrm_v3.masks_of(config, found))
    n = config.static_max(1)
    return _case(
        "dlrm_v3",
        dlrm_v3.STULayer(config),
        (_normal(*k.role.shape, s.width),),
        lambda m, floats, given: m(*floats, (*given, rule), float(n), train=False),
        (q, k),
        {"allow": rule.allow(q, k)},
        heads=s.heads,
        n=n,
    )


def _mtgr(s: Size) -> Case:
    config, found = mtgr.Config(history=s.history, width=s.width, heads=s.heads), features(s)
    q, k, rule = _first(mtgr.masks_of(config, found))
    group_rn, n = mtgr.groups(found), config.static_max(1)
    return _case(
        "mtgr",
        mtgr.Layer(config),
        (_normal(*k.role.shape, s.width),),
        lambda m, floats, given: m(*floats, given[0], (*given[1:], rule), float(n)),
        (group_rn, q, k),
        {"allow": rule.allow(q, k), "group": group_rn},
        heads=s.heads,
        n=n,
    )


def _grab(s: Size) -> Case:
    config, found = grab.Config(history=s.history, width=s.width, heads=s.heads), features(s)
    channel_rs, seen = grab.channel_of(config, found), grab.sights(config, found)
    of_event, of_candidate = seen
    by_channel = [
        of_candidate.rule.allow(of_candidate.q, jax.tree.map(lambda x, a=a: x[a], of_candidate.k))
        for a in range(config.channels)
    ]
    arrays = {
        "channel": channel_rs,
        "event_allow": of_event.rule.allow(of_event.q, of_event.k),
        "allow": np.stack(by_channel),
        "event_rows": np.stack(of_event.rows),
        "rows": np.stack(of_candidate.rows),
    }
    x_arnd = _normal(config.channels, s.rows, s.history + s.listed, s.width)

    def call(m: nn.Module, floats: tuple[jax.Array, ...], given: Any) -> jax.Array:
        sights = [
            dataclasses.replace(sight, q=q, k=k, rows=rows)
            for sight, (q, k, rows) in zip(seen, given[1], strict=True)
        ]
        return m(*floats, given[0], tuple(sights), last=False)

    given = (channel_rs, [(x.q, x.k, x.rows) for x in seen])
    layer = grab.Layer(config, mixes=True, time_exact=True)
    return _case("grab", layer, (x_arnd,), call, given, arrays, heads=s.heads)


def _longer(s: Size) -> Case:
    tokens = sequence.tokens(features(s), context=0)
    return _case(
        "encoder",
        transformer_block.Block(s.heads),
        (_normal(*tokens.role.shape, s.width),),
        lambda m, floats, t: m(*floats, t, t, longer.RULE, train=False),
        tokens,
        {"allow": longer.RULE.allow(tokens, tokens)},
        heads=s.heads,
    )


def _onetrans(s: Size) -> Case:
    config = onetrans.Config(
        history=s.history, tokens=s.tokens, width=s.width, heads=s.heads, pyramid=False
    )
    found = features(s)
    q, k, rule = _first(onetrans.masks_of(config, found))
    own = s.listed * s.tokens
    shared = k.role.shape[1] - own
    allow_rnm = np.asarray(rule.allow(q, k))
    return _case(
        "onetrans",
        onetrans.Block(config),
        (_normal(s.rows, shared, s.width), _normal(s.tokens, s.rows * s.listed, s.width)),
        lambda m, floats, given: jnp.concatenate(
            [x.reshape(-1, s.width) for x in m(floats, *given)]
        ),
        (q, k),
        {"allow": allow_rnm[:, :shared, :shared], "own_allow": allow_rnm[:, shared:]},
        heads=s.heads,
    )


BLOCKS: dict[str, Callable[[Size], Case]] = {
    "dlrm_mlp": _mlp,
    "dlrm": _dots,
    "dcnv2_din": _cross,
    "dcnv2_din.history": lambda s: _target_attention(s, "sigmoid"),
    "din": _din_layer,
    "din.history": lambda s: _target_attention(s, "dice"),
    "autoint": _autoint,
    "wukong": _wukong,
    "transformer": _transformer,
    "heteroatt": _heteroatt,
    "hiformer": _hiformer,
    "hhft": _hhft,
    "rankmixer": _rankmixer,
    "tokenmixer_large": _tokenmixer_large,
    "hstu": _hstu,
    "dlrm_v3": _dlrm_v3,
    "mtgr": _mtgr,
    "grab": _grab,
    "longer": _longer,
    "onetrans": _onetrans,
}
