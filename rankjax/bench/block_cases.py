"""What `rankjax bench models` times: one block of every architecture, with all that goes into it.

A case also says which function of experiments/peers/torch_layers.py computes the same equations,
and what that function is given beside the parameters and the inputs: masks and look-up indices,
which a model makes once for all of its layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rankjax.batch import Tokens
from rankjax.bench.block_inputs import Size, features, normal, random_params
from rankjax.kernels.hstu_attention import bias as bias_lib
from rankjax.layers import (
    activations,
    feed_forward,
    history_pooling,
    norms,
    sequence,
    transformer_block,
)
from rankjax.layers import per_token as per_token_layers
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
    init = lambda key: module.init(key, floats, given, method=call).get("params", {})
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


# --- parts, by which the blocks are explained -------------------------------------------------


class _Function(nn.Module):
    """A function of the inputs alone."""

    function: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, *floats: jax.Array) -> jax.Array:
        return self.function(*floats)


def _part(peer: str, function: Callable[..., jax.Array], *floats: np.ndarray) -> Case:
    return _case(peer, _Function(function), floats)


def _hidden(s: Size) -> np.ndarray:
    return normal(s.tokens, s.candidates, 4 * s.width)


def _matmul(s: Size, per_token: bool) -> Case:
    """All tokens by one matrix, or each by its own, four times as wide."""
    x_tnd, w_tdf = _tokens(s), normal(s.tokens, s.width, 4 * s.width)
    if per_token:
        return _part("matmul", lambda x, w: per_token_layers.matmul(x, w, "float32"), x_tnd, w_tdf)
    return _part("matmul", jnp.matmul, x_tnd.reshape(-1, s.width), w_tdf[0])


def _weight_gradient(s: Size) -> Case:
    """x_t^T g_t, as it is written where `per_token.matmul` is differentiated."""
    product = lambda x, g: jax.lax.dot_general(x, g, (((1,), (1,)), ((0,), (0,))))
    return _part("weight_gradient", product, _tokens(s), _hidden(s))


PARTS: dict[str, Callable[[Size], Case]] = {
    "part.matmul": lambda s: _matmul(s, per_token=False),
    "part.matmul_per_token": lambda s: _matmul(s, per_token=True),
    "part.weight_gradient": _weight_gradient,
    "part.gelu": lambda s: _part("gelu", activations.gelu, _hidden(s)),
    "part.gelu_by_erfc": lambda s: _part(
        "gelu", functools.partial(nn.gelu, approximate=False), _hidden(s)
    ),
    "part.layer_norm": lambda s: _part("layer_norm", norms.Norm(affine=False).bind({}), _tokens(s)),
}


# --- feature interaction: token-major [T, N, D], or all inputs side by side [N, W] ------------


def _tokens(s: Size) -> np.ndarray:
    return normal(s.tokens, s.candidates, s.width)


def _mlp(s: Size) -> Case:
    widths = (4 * s.width, 4 * s.width)
    x_nw = normal(s.candidates, s.tokens * s.width)
    return _case("mlp", feed_forward.MLP(widths), (x_nw,), layers=len(widths))


def _dots(s: Size) -> Case:
    def call(m: nn.Module, floats: tuple[jax.Array, ...], given: Any) -> jax.Array:
        (x_vnd,) = floats
        return m(jnp.concatenate([x_vnd[0], dlrm.dots(x_vnd)], axis=-1))

    top = feed_forward.MLP((4 * s.width, 4 * s.width))
    return _case("dots", top, (_tokens(s),), call, layers=2)


def _cross(s: Size) -> Case:
    x0, x = normal(2, s.candidates, s.tokens * s.width)
    return _case("cross", dcnv2.Cross(dcnv2.Config(rank=s.width)), (x0, x))


def _target_attention(s: Size, activation: str) -> Case:
    found = features(s)
    reads_rcs = np.asarray(history_pooling.same_sample(found))

    def call(m: nn.Module, floats: tuple[jax.Array, ...], reads_rcs: jax.Array) -> jax.Array:
        return jnp.einsum("rcs,rsw->rcw", m(*floats, reads_rcs), floats[0])

    floats = (normal(s.rows, s.history, s.width + 8), normal(s.rows, s.listed, s.width))
    module = history_pooling.TargetAttention((36,), activation)
    return _case("target_attention", module, floats, call, reads_rcs, {"reads": reads_rcs})


def _din_layer(s: Size) -> Case:
    x_nw = normal(s.candidates, s.tokens * s.width)
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
    x_nw = normal(s.candidates, s.width)
    return _case("hhft", hhft.HiformerLayer(config), (x_nw,), heads=s.heads, tokens=s.tokens)


def _rankmixer(s: Size) -> Case:
    block = rankmixer.Block(rankmixer.Config(tokens=s.tokens, width=s.width))
    return _case("rankmixer", block, (_tokens(s),), lambda m, floats, given: m(*floats)[0])


def _tokenmixer_large(s: Size) -> Case:
    config = tokenmixer_large.Config(tokens=s.tokens, width=s.width)
    return _case("tokenmixer_large", tokenmixer_large.Block(config), (_tokens(s),))


# --- sequences: [R, N, D], masked by what is known of the tokens ------------------------------


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
        (normal(*k.role.shape, s.width),),
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
        (normal(*k.role.shape, s.width),),
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
        (normal(*k.role.shape, s.width),),
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
    x_arnd = normal(config.channels, s.rows, s.history + s.listed, s.width)

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
        (normal(*tokens.role.shape, s.width),),
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
        (normal(s.rows, shared, s.width), normal(s.tokens, s.rows * s.listed, s.width)),
        lambda m, floats, given: jnp.concatenate(
            [x.reshape(-1, s.width) for x in m(floats, *given)]
        ),
        (q, k),
        {"allow": allow_rnm[:, :shared, :shared], "own_allow": allow_rnm[:, shared:]},
        heads=s.heads,
    )


BLOCKS: dict[str, Callable[[Size], Case]] = {
    **PARTS,
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
