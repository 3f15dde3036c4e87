"""Every architecture's block beside plain PyTorch; what pruning saves; how per-token layers run.

A block is compared before it is timed: the peer gets our parameters, inputs, output and gradients'
norms, and ends the run where its own differ.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rankjax import models
from rankjax.bench import block_cases, block_inputs, rounds
from rankjax.bench.block_cases import Case
from rankjax.bench.block_inputs import Size
from rankjax.layers import activations, per_token
from rankjax.models import dlrm_v3, grab, hiformer, hstu, longer, mtgr, onetrans

PARTS = ("forward", "forward_backward")
AT_ONCE = 4  # blocks; a round of so few and of their peers meets one state of a shared machine
# Batch, tokens, width of the per-token feed-forward, 4 x wide inside.
FEED_FORWARDS = {"small": (256, 8, 32), "large": (256, 16, 256)}


def run(
    config: rounds.Rounds,
    *,
    blocks: tuple[str, ...] = (),
    sizes: dict[str, Size] = block_inputs.SIZES,
    compiled: bool = False,
) -> dict[str, Any]:
    """Seconds of one block of every architecture, forward, and forward and backward.

    Args:
      blocks: names of block_cases.BLOCKS; () = all.
      sizes: {name: Size}.
      compiled: the peers pass torch.compile.
    Returns: {"blocks": {"<block>/<size>": {"ours": {part: figure}, and with peers "peer",
      "peer_seconds_over_ours": {part: ratio}, "max_deviation"}}, "peers"}. A ratio is the median
      over rounds of the ratio of a round's medians; above 1 ours is faster.
    Raises ValueError for an unknown block, RuntimeError where a peer's values differ.
    """
    jobs = [(f"{block}/{size}", block, sizes[size]) for size in sizes for block in chosen(blocks)]
    out: dict[str, Any] = {}
    peers: dict[str, Any] = {}
    for start in range(0, len(jobs), AT_ONCE):
        cases = {
            name: block_cases.BLOCKS[block](size)
            for name, block, size in jobs[start : start + AT_ONCE]
        }
        found, peers = _measure(cases, config, compiled)
        out |= found
    return {"blocks": out, "peers": peers}


def _measure(
    cases: dict[str, Case], config: rounds.Rounds, compiled: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """("blocks", "peers") as `run` returns them."""
    jobs: dict[str, Callable[[], float]] = {}
    items: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(cases.items()):
            calls = functions(case)
            jobs |= {f"{name}/{part}": rounds.timed(calls[part]) for part in PARTS}
            if config.peers:
                file = pathlib.Path(folder) / f"{number}.npz"
                save(case, calls["forward_backward"], file)
                items += peer_items(name, case, file, compiled)
        seconds, peers = rounds.measure(jobs, items, config, in_turn=False)
    results = peers.pop("results", {})
    out = {}
    for name in cases:
        ours = {part: seconds[f"{name}/{part}"] for part in PARTS}
        out[name] = {"ours": {part: rounds.figure(s) for part, s in ours.items()}}
        if results:
            peer = {part: results[f"{name}/{part}"]["seconds"] for part in PARTS}
            deviations = [results[f"{name}/{part}"]["max_deviation"] for part in PARTS]
            out[name] |= {
                "peer": {part: rounds.figure(s) for part, s in peer.items()},
                "peer_seconds_over_ours": {
                    part: ratio(peer[part], ours[part], config.repeats) for part in PARTS
                },
                "max_deviation": max(deviations),
            }
    return out, peers


def chosen(blocks: tuple[str, ...]) -> tuple[str, ...]:
    """All where () is asked for. Raises ValueError for names of no block."""
    if unknown := sorted(set(blocks) - set(block_cases.BLOCKS)):
        raise ValueError(
            f"bench models: blocks={unknown}, expected some of {sorted(block_cases.BLOCKS)}"
        )
    return blocks or tuple(block_cases.BLOCKS)


def ratio(over: list[float], under: list[float], repeats: int) -> float:
    """The median over rounds, each of `repeats` values, of the ratio of medians."""
    by_round = [np.median(np.reshape(x, (-1, repeats)), axis=1) for x in (over, under)]
    return float(np.median(by_round[0] / by_round[1]))


def functions(case: Case) -> dict[str, Callable[[], Any]]:
    """{"forward": a compiled call -> output, "forward_backward": one -> (output, gradients)}.

    The gradients are those of sum(output * cotangent), with respect to parameters and floats.
    """
    held = jax.device_put((case.params, case.floats, case.given))
    forward = jax.jit(case.apply)

    @jax.jit
    def forward_backward(params: Any, floats: Any, given: Any, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(lambda p, x: case.apply(p, x, given), params, floats)
        return out, pull(cotangent)

    cotangent = jnp.asarray(_cotangent(case))
    return {
        "forward": lambda: forward(*held),
        "forward_backward": lambda: forward_backward(*held, cotangent),
    }


def _cotangent(case: Case) -> np.ndarray:
    out = jax.eval_shape(case.apply, case.params, case.floats, case.given)
    return np.random.default_rng(3).normal(size=out.shape).astype(np.float32)


def save(case: Case, forward_backward: Callable[[], Any], file: pathlib.Path) -> None:
    """Writes what torch_layers.Saved reads."""
    out, (params, floats) = forward_backward()

    def leaves(params: Any, floats: tuple[Any, ...]) -> dict[str, np.ndarray]:
        found = {f"p:{path}": x for path, x in block_inputs.flat(params).items()}
        return found | {f"x:{i}": np.asarray(x) for i, x in enumerate(floats)}

    # float64: the sum of a million squares in float32 is off by nearly the tolerance.
    gradients = leaves(params, floats)
    norms = {f"norm:{k}": np.linalg.norm(x.astype(np.float64)) for k, x in gradients.items()}
    arrays = {f"a:{name}": x for name, x in case.arrays.items()}
    values = {"out": np.asarray(out), "cotangent": _cotangent(case)}
    np.savez(file, **leaves(case.params, case.floats), **norms, **arrays, **values)


def peer_items(
    name: str, case: Case, file: pathlib.Path, compiled: bool = False
) -> list[dict[str, Any]]:
    """Entries of torch_peers.py's WORK.json, one for each part."""
    item = {"kind": "layer", "file": str(file), "function": case.peer, "options": case.options}
    item["compiled"] = compiled
    return [{**item, "name": f"{name}/{part}", "part": part} for part in PARTS]


def pruned(config: rounds.Rounds, sizes: dict[str, Size] = block_inputs.SIZES) -> dict[str, Any]:
    """Seconds of models of two layers whose last one computes all rows, or those that are read.

    Of every sequence model, and of Hiformer with its task tokens.
    Returns: {"<model>/<size>": {"full": {part: figure}, "pruned": ...,
      "full_seconds_over_pruned": {part: ratio}}}.
    """
    out: dict[str, Any] = {}
    for size_name, s in sizes.items():
        for model, both in _pruned_configs(s).items():
            jobs: dict[str, Callable[[], float]] = {}
            for kind, model_config in both.items():
                calls = functions(_whole(models.MODELS[model](model_config), s))
                jobs |= {f"{kind}/{part}": rounds.timed(calls[part]) for part in PARTS}
            seconds, _ = rounds.measure(jobs, [], dataclasses.replace(config, peers=False))
            found = {k: {p: seconds[f"{k}/{p}"] for p in PARTS} for k in both}
            out[f"{model}/{size_name}"] = {
                **{k: {p: rounds.figure(x) for p, x in own.items()} for k, own in found.items()},
                "full_seconds_over_pruned": {
                    p: ratio(found["full"][p], found["pruned"][p], config.repeats) for p in PARTS
                },
            }
    return out


def _pruned_configs(s: Size) -> dict[str, dict[str, Any]]:
    """{model: {"full": its Config, "pruned": the same with prune_last}}."""
    wide = {"width": s.width, "heads": s.heads, "layers": 2}
    stream = {"history": s.history, **wide}
    tokens = {"tokenizer": "even_split", "tokens": s.tokens}
    configs = {
        "hiformer": hiformer.HiformerConfig(**tokens, **wide),
        "hstu": hstu.Config(**stream),
        "dlrm_v3": dlrm_v3.Config(**stream),
        "mtgr": mtgr.Config(**stream),
        "grab": grab.Config(**stream),
        "longer": longer.Config(**stream),
        # A pyramid's last layer has few rows anyway.
        "onetrans": onetrans.Config(**stream, tokens=s.tokens, pyramid=False),
    }
    return {
        name: {k: dataclasses.replace(c, prune_last=k == "pruned") for k in ("full", "pruned")}
        for name, c in configs.items()
    }


def _whole(module: nn.Module, size: Size) -> Case:
    """A whole model on looked-up features, gradients with respect to parameters only."""
    features = block_inputs.features(size)
    apply = lambda params, floats, given: module.apply({"params": params}, given, train=False)[0]
    init = lambda key: module.init(key, features, train=False)["params"]
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    params = block_inputs.random_params(shapes, np.random.default_rng(1))
    none = {"floats": (), "peer": "", "arrays": {}, "options": {}}
    return Case(apply=apply, params=params, given=features, **none)


def feed_forwards(
    config: rounds.Rounds, shapes: dict[str, tuple[int, int, int]] = FEED_FORWARDS
) -> dict[str, Any]:
    """GFLOP/s of one per-token GELU feed-forward, 4 x wide, in the ways to write it.

    Returns: {size: {"shape": [B, T, D], way: {part: figure}}}; a pass counts 16 B T D^2 FLOPs
    forward and three times that with the gradients of inputs and weights.
    """
    jobs: dict[str, Callable[[], float]] = {}
    for name, (B, T, D) in shapes.items():
        for way, case in ways(B, T, D).items():
            calls = functions(case)
            jobs |= {f"{name}/{way}/{part}": rounds.timed(calls[part]) for part in PARTS}
    seconds, _ = rounds.measure(jobs, [], dataclasses.replace(config, peers=False))
    out: dict[str, Any] = {}
    for name, (B, T, D) in shapes.items():
        out[name] = {"shape": [B, T, D]}
        work = {"forward": 16 * B * T * D**2, "forward_backward": 48 * B * T * D**2}
        for way in ways(B, T, D):
            out[name][way] = {
                part: rounds.figure(
                    [1e-9 * work[part] / s for s in seconds[f"{name}/{way}/{part}"]]
                )
                for part in PARTS
            }
    return out


def ways(B: int, T: int, D: int) -> dict[str, Case]:
    """{way: a per-token feed-forward, parameters the same}; "einsum" takes and gives [B, T, D]."""
    x_tbd = np.random.default_rng(0).normal(size=(T, B, D)).astype(np.float32)
    module = per_token.FeedForward(4)
    shapes = jax.eval_shape(lambda key: module.init(key, x_tbd)["params"], jax.random.key(0))
    params = block_inputs.random_params(nn.unbox(shapes), np.random.default_rng(1))

    def one(p: Any, x_bd: jax.Array) -> jax.Array:
        """The feed-forward of one token."""
        h_bf = activations.gelu(x_bd @ p["ffn_in"]["kernel"] + p["ffn_in"]["bias"])
        return h_bf @ p["ffn_out"]["kernel"] + p["ffn_out"]["bias"]

    def einsum(p: Any, floats: tuple[jax.Array], given: Any) -> jax.Array:
        product = lambda x, p: jnp.einsum("btd,tdf->btf", x, p["kernel"]) + p["bias"]
        return product(activations.gelu(product(floats[0], p["ffn_in"])), p["ffn_out"])

    def scan(p: Any, floats: tuple[jax.Array], given: Any) -> jax.Array:
        return jax.lax.scan(lambda _, px: (None, one(*px)), None, (p, floats[0]))[1]

    found = {
        "einsum": einsum,
        "scan": scan,
        "map": lambda p, floats, given: jax.lax.map(lambda px: one(*px), (p, floats[0])),
        "token_major": lambda p, floats, given: module.apply({"params": p}, floats[0]),
    }
    cases = {}
    for way, apply in found.items():
        floats = (x_tbd.swapaxes(0, 1).copy() if way == "einsum" else x_tbd,)
        rest = {"given": None, "peer": "", "arrays": {}, "options": {}}
        cases[way] = Case(apply=apply, params=params, floats=floats, **rest)
    return cases
