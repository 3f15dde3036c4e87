"""`rankjax bench kernels`: attention by every implementation, beside its peers; jagged rows.

Every implementation is compared with the reference before it is timed. TFLOP/s count the pairs that
may be read; the share of the peak is of a matrix product that the same run measures.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rankjax import packing
from rankjax.bench import attention_cases as cases
from rankjax.bench import attention_peers as peers_lib
from rankjax.bench import blocks as blocks_bench
from rankjax.bench import rounds
from rankjax.kernels import blocks, softmax_attention
from rankjax.kernels.hstu_attention import tiles

PARTS = ("forward", "forward_backward")
OF_PLATFORM = {"cpu": ("xla",), "tpu": ("pallas_tpu", "xla"), "gpu": ("pallas_gpu", "xla")}
SOFTMAX_OF = {
    "cpu": ("xla", "jax_nn"),
    "tpu": ("splash", "xla"),
    "gpu": ("tokamax", "jax_nn", "xla"),
}
NAIVE = 2**27  # most elements of an array of all pairs: 512 MiB in float32, and there are several
# Largest deviation from the reference, of the largest value; bfloat16 rounds weights to 8 bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
UNSUITED = (ImportError, ValueError, RuntimeError)  # cuDNN's "not detected" is a RuntimeError
CHECKED = 300  # tokens of the row that is compared: no multiple of any block


def platform() -> Literal["cpu", "tpu", "gpu"]:
    found = jax.default_backend()
    return "gpu" if found in ("cuda", "rocm") else found


def check(dtype: str, width: int, heads: int) -> dict[str, float]:
    """{implementation: largest deviation}. Raises RuntimeError where one exceeds TOLERANCE."""
    s = cases.shape("jagged", CHECKED, 2 * CHECKED, True, heads=heads, width=width, dtype=dtype)
    attention = lambda name, **more: functools.partial(
        cases.silu_attention, implementation=name, **more
    )
    # A tile is named, else so few pairs go in one piece; those in use fit every device.
    names = OF_PLATFORM[platform()]
    candidates = {name: attention(name, tile=tiles.best(name, width)) for name in names}
    return _compare(s, attention("reference"), candidates)


def check_softmax(dtype: str, width: int, heads: int) -> dict[str, float]:
    """The same of the peers; one that does not take the call is left out, and is not timed."""
    sizes = {"heads": heads, "width": width, "dtype": dtype}
    found: dict[str, float] = {}
    for layout in ("jagged", "full"):
        s = cases.shape(layout, CHECKED, 2 * CHECKED, False, **sizes)
        reference = functools.partial(_softmax, implementation="reference")
        got = _compare(s, reference, dict(_softmax_candidates(s)), optional=True)
        found |= {name: max(x, found.get(name, 0.0)) for name, x in got.items()}
    return found


def _compare(
    s: cases.Shape,
    reference: Callable[..., jax.Array],
    candidates: dict[str, Callable[..., jax.Array]],
    optional: bool = False,
) -> dict[str, float]:
    """{name: largest deviation from the reference in float32, of output and gradients}."""
    p = cases.problem(s)
    exact = [x.astype(jnp.float32) for x in p.arrays]
    with jax.default_matmul_precision("highest"):
        wide = cases.Problem(tuple(exact), p.bias, p.tokens, p.d.astype(jnp.float32))
        want = _results(wide, reference)
    found = {}
    for name, attention in candidates.items():
        try:
            got = _results(p, attention)
        except UNSUITED:
            if not optional:
                raise
            continue  # `one` says why
        found[name] = max(
            float(np.abs(g - w).max() / max(np.abs(w).max(), 1e-9)) for g, w in zip(got, want)
        )
        if not found[name] <= TOLERANCE[s.dtype]:  # NaN too
            raise RuntimeError(
                f"bench kernels: {name!r} deviates from the reference by {found[name]:.2e} of the "
                f"largest value, expected at most {TOLERANCE[s.dtype]:.0e} in {s.dtype}"
            )
    return found


def _results(p: cases.Problem, attention: Callable[..., jax.Array]) -> list[np.ndarray]:
    program, args = cases.programs(p, attention, PARTS[1:])["forward_backward"]
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(program(*args))]


def peak(dtype: str, config: rounds.Rounds) -> dict[str, Any]:
    """TFLOP/s of a large square matrix product, the fastest of all repeats."""
    n = 2048 if platform() == "cpu" else 8192
    # Drawn: where all numbers are alike a GPU needs less power and clocks higher.
    x = jax.random.normal(jax.random.key(0), (n, n), cases.DTYPES[dtype])
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(x.dtype))
    alone = dataclasses.replace(config, peers=False)
    seconds, _ = rounds.measure({"peak": rounds.timed(lambda: product(x))}, [], alone)
    return {"n": n, "dtype": dtype, "tflops": 2 * n**3 / min(seconds["peak"]) / 1e12}


def run(
    config: rounds.Rounds,
    *,
    lengths: tuple[int, ...],
    width: int = 128,
    heads: int = 4,
    tokens: int = 4096,
    dtype: str = "float32",
    compiled: bool = False,
    found: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Seconds, TFLOP/s and memory over N, full and jagged, with and without bias.

    Args:
      lengths: N.
      tokens: of a call, about: R = tokens / N.
      compiled: the PyTorch peer passes torch.compile.
      found: filled as cases are done, so that an interrupted run keeps what it has.
    Returns: {"settings", "peak", "checked", "cases": {"N1024/full/bias": {"rows", "pairs",
      "all_pairs", "implementations": {name: {part: {"seconds", "tflops", "percent_of_peak",
      "temporary_bytes", "xla_seconds_over"}}}, "skipped": {name: why}}}}. Softmax attention of the
      same shape stands as "softmax/...", where there is no bias.
    """
    found = {} if found is None else found
    sizes = {"heads": heads, "width": width, "dtype": dtype}
    found["settings"] = {**sizes, "tokens": tokens, "shortest": f"N / {cases.SHORTEST}"}
    found["checked"] = check(dtype, width, heads) | check_softmax(dtype, width, heads)
    found["peak"] = peak(dtype, config)
    found["cases"] = {}
    for length in lengths:
        for layout in ("full", "jagged"):
            for bias in (False, True):
                name = f"N{length}/{layout}/{'bias' if bias else 'plain'}"
                s = cases.shape(layout, length, tokens, bias, **sizes)
                found["cases"][name] = one(s, config, found["peak"]["tflops"], compiled)
    return found


def one(
    s: cases.Shape, config: rounds.Rounds, peak_tflops: float, compiled: bool
) -> dict[str, Any]:
    """An entry of "cases"."""
    p = cases.problem(s)
    flops, skipped = s.flops(), {}
    measured: dict[str, dict[str, Any]] = {}
    jobs: dict[str, Callable[[], float]] = {}
    for name, attention in _candidates(s):
        try:
            found = cases.programs(p, attention)
        except UNSUITED as why:
            skipped[name] = str(why).splitlines()[0][:200]
            continue
        measured[name] = {}
        for part, (program, args) in found.items():
            memory = program.memory_analysis()
            size = None if memory is None else memory.temp_size_in_bytes
            measured[name][part] = {"temporary_bytes": size}
            jobs[f"{name}/{part}"] = rounds.timed(functools.partial(program, *args))
    if s.all_pairs > NAIVE:
        skipped["reference"] = f"arrays of {s.all_pairs} elements, at most {NAIVE}"
    items = peers_lib.items(s, p, compiled) if config.peers and s.all_pairs <= NAIVE else []
    seconds, peers = rounds.measure(jobs, items, config)
    for part in PARTS if (results := peers.pop("results", {})) else ():
        measured.setdefault("torch", {})[part] = {}
        seconds[f"torch/{part}"] = results[f"torch/{part}"]["seconds"]
    for name, parts in measured.items():
        for part, entry in parts.items():
            own = seconds[f"{name}/{part}"]
            tflops = flops[part] / float(np.median(own)) / 1e12
            entry |= {"seconds": rounds.figure(own), "tflops": tflops}
            entry["percent_of_peak"] = 100 * tflops / peak_tflops
            over = blocks_bench.ratio(seconds[f"xla/{part}"], own, config.repeats)
            entry["xla_seconds_over"] = over
    counts = {"rows": len(s.lengths), "pairs": s.pairs, "all_pairs": s.all_pairs}
    out = {**counts, "implementations": measured, "skipped": skipped}
    return out | ({"peers": peers} if config.peers else {})


def _candidates(s: cases.Shape) -> Iterator[tuple[str, Callable[..., jax.Array]]]:
    """(name, attention) of everything that this platform may run."""
    names = OF_PLATFORM[platform()] + (("reference",) if s.all_pairs <= NAIVE else ())
    for name in names:
        yield name, functools.partial(cases.silu_attention, implementation=name)
    if not s.bias:
        yield from _softmax_candidates(s)


def _softmax(p: cases.Problem, arrays: Any, bias: None, implementation: str) -> jax.Array:
    return softmax_attention.softmax_attention(
        *(*arrays, p.tokens, p.tokens, cases.RULE),
        **{"scale": arrays[0].shape[-1] ** -0.5, "implementation": implementation},
    )


def _softmax_candidates(s: cases.Shape) -> Iterator[tuple[str, Callable[..., jax.Array]]]:
    for name in SOFTMAX_OF[platform()]:
        if name != "jax_nn" or s.all_pairs <= NAIVE or platform() == "gpu":
            yield f"softmax/{name}", functools.partial(_softmax, implementation=name)
    if platform() == "gpu" and all(len(users) == 1 for users in s.lengths):
        yield "softmax/cudnn_causal", peers_lib.cudnn_causal


def jagged(
    lengths_of: dict[str, np.ndarray],
    config: rounds.Rounds,
    *,
    width: int = 128,
    heads: int = 4,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What packing saves, for users with these history lengths, {name: int [B]}.

    Returns {name: {"users", "longest", "mean", "padded" and "packed": {"rows", "slots",
      "padding_share", "tiles", "seconds"}, "padded_seconds_over_packed", "slots_saved"}}. Padded:
      one user a row; packed: `packing.assign`'s rows of as many slots as the longest user needs.
      Forward and backward with both tables, by the platform's first implementation.
    """
    out = {}
    for name, lengths in lengths_of.items():
        found, jobs = _layouts(lengths, width, heads, dtype)
        seconds, _ = rounds.measure(jobs, [], dataclasses.replace(config, peers=False))
        for layout, own in seconds.items():
            found[layout]["seconds"] = rounds.figure(own)
        over = blocks_bench.ratio(seconds["padded"], seconds["packed"], config.repeats)
        users = {"users": len(lengths), "longest": int(lengths.max())}
        out[name] = {
            **{**users, "mean": float(lengths.mean()), **found},
            "padded_seconds_over_packed": over,
            "slots_saved": 1 - found["packed"]["slots"] / found["padded"]["slots"],
        }
    return out


def _layouts(lengths: np.ndarray, width: int, heads: int, dtype: str) -> tuple[dict, dict]:
    longest, ones = int(lengths.max()), np.ones(len(lengths), np.int64)
    row = packing.assign(lengths, ones, history_slots=longest, candidate_slots=len(lengths))
    packed = tuple(tuple(lengths[row == r].tolist()) for r in range(row.max() + 1))
    found, jobs = {}, {}
    first = OF_PLATFORM[platform()][0]
    attention = functools.partial(cases.silu_attention, implementation=first)
    tile = tiles.best(first, width).forward
    for layout, rows in {"padded": tuple((n,) for n in lengths.tolist()), "packed": packed}.items():
        sizes = {"length": longest, "heads": heads, "width": width, "dtype": dtype}
        s = cases.Shape(lengths=rows, bias=True, **sizes)
        p = cases.problem(s)
        cut = [jax.tree.map(lambda x, b=b: blocks.padded(x, b), p.tokens) for b in tile[:2]]
        active = blocks.active(cases.RULE, *cut, *tile[:2])
        slots = len(rows) * longest
        share = 1 - int(lengths.sum()) / slots
        found[layout] = {"rows": len(rows), "slots": slots, "padding_share": share}
        found[layout]["tiles"] = int(active.sum())
        program, args = cases.programs(p, attention, PARTS[1:])["forward_backward"]
        jobs[layout] = rounds.timed(functools.partial(program, *args))
    return found, jobs
