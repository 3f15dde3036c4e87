"""The named sizes of every architecture: parameters, FLOPs, trees, masks; docs/fidelity.md.

Everything comes from shapes (`jax.eval_shape`): a model of a billion parameters costs no memory.
"""

import dataclasses
import difflib
import functools
import math
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.tree

from rankjax import embedding, models, papers
from rankjax.batch import CANDIDATE, CONTEXT, GLOBAL, HISTORY, PAD, Features, Tokens
from rankjax.data.sources import synthetic
from rankjax.layers import tokenizers
from rankjax.scaling import markup, presets, sizes
from rankjax.schema import Schema

COLUMNS = (
    *("name", "architecture", "paper", "chosen", "paper_params", "paper_flops", "paper_scope", "n"),
    *("dense_params", "flops", "tokens", "layers", "width", "heads", "note"),
)
WIDTH = embedding.TableConfig().width  # E
ON = (
    "dense_params and flops: the whole dense model on the synthetic world's features with "
    f"embeddings of width {WIDTH}, forward, one candidate and a full history"
)
HISTORY_SLOTS = 50  # of architectures whose Config has no history
ROLES = {PAD: "padding", CONTEXT: "context", HISTORY: "history", GLOBAL: "global"}
ROLES[CANDIDATE] = "candidate"


def module_of(architecture: str) -> ModuleType:
    """The file of an architecture."""
    return sys.modules[models.MODELS[architecture].__module__]


def named() -> dict[str, tuple[str, papers.Size]]:
    """{name: (architecture, size)} of every named size, in the order of MODELS."""
    found: dict[str, tuple[str, papers.Size]] = {}
    for architecture, cls in models.MODELS.items():
        own = cls.__dataclass_fields__["config"].type
        for name, size in module_of(architecture).PAPER.sizes.items():
            if type(size.config) is own:  # two architectures may share a file
                found[name] = (architecture, size)
    return found


def rows() -> list[dict[str, Any]]:
    """One row, with COLUMNS, per named size; "note" says what the world's features changed."""
    return [_row(name, *found) for name, found in named().items()]


def _row(name: str, architecture: str, size: papers.Size) -> dict[str, Any]:
    config, paper = size.config, module_of(architecture).PAPER
    fields, axes = dataclasses.asdict(config), type(config).axes
    counted, at = size.counted, {"n": size.n} if size.n else {}
    row = {
        "name": name,
        "architecture": architecture,
        "paper": f"{paper.title} (arXiv {paper.arxiv})" if paper.arxiv else paper.title,
        "chosen": size.chosen,
        "paper_params": counted.paper_params(),
        "paper_flops": counted.paper_flops(**at),
        "paper_scope": type(config).paper_scope,
        "n": size.n,
        "tokens": size.tokens or fields.get(axes.get("T", axes.get("S", ""))),
        "layers": fields.get(axes.get("L", "")),
        "width": fields.get(axes.get("D", "")),
        "heads": fields.get("heads"),
    }
    config, row["note"] = fitting(config)
    schema, history = world_schema(), fields.get("history", HISTORY_SLOTS)
    row["dense_params"] = sizes.dense_params(config, schema, WIDTH)
    row["flops"] = sizes.forward_count(config, schema, WIDTH, True, history, 1).total
    return {column: row[column] for column in COLUMNS}


def fitting(config: Any) -> tuple[Any, str]:
    """The Config as the world's features can fill it, and what was changed ("" = nothing).

    A number of tokens that is printed, with a tokenizer that takes it from the data, is kept with
    "even_split" instead.
    """
    fields = dataclasses.asdict(config)
    if fields.get("tokens") is None or fields.get("tokenizer") not in tokenizers.FROM_DATA:
        return config, ""
    try:
        sizes.dense_params(config, world_schema(), WIDTH)
    except ValueError as error:
        return dataclasses.replace(config, tokenizer="even_split"), f"even_split, since {error}"
    return config, ""


def world_schema() -> Schema:
    return synthetic.schema(synthetic.WORLD_SMALL)


def find(name: str) -> tuple[Any, str]:
    """(Config, architecture) of a named size, or of an architecture's small default.

    Raises ValueError for an unknown name.
    """
    sizes_of = named()
    if name in sizes_of:
        architecture, size = sizes_of[name]
        return size.config, architecture
    if name in models.MODELS:
        return presets.model(name, tasks=1), name
    close = difflib.get_close_matches(name, [*sizes_of, *models.MODELS], n=3)
    meant = f" (near it: {', '.join(close)})" if close else ""
    raise ValueError(f"models: found {name!r}, expected a name that `rankjax models` lists{meant}")


def as_tree(name: str, leaves: list[tuple[str, tuple[int, ...]]]) -> rich.tree.Tree:
    """The parameters as a tree of modules, each with its count."""
    total = sum(math.prod(shape) for _, shape in leaves)
    root = rich.tree.Tree(f"{name}: {total:,} dense parameters")
    nodes = {"": root}
    for path, shape in leaves:
        *modules, leaf = path.split("/")
        for depth in range(1, len(modules) + 1):
            inside = "/".join(modules[:depth])
            if inside not in nodes:
                own = sum(math.prod(s) for p, s in leaves if p.startswith(f"{inside}/"))
                above = nodes["/".join(modules[: depth - 1])]
                nodes[inside] = above.add(f"{modules[depth - 1]}: {own:,}")
        nodes["/".join(modules)].add(f"{leaf} {list(shape)}", highlight=False)
    return root


def tree(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(path, shape) of every dense parameter, on the world's features (see `fitting`)."""
    params = sizes.abstract_params(fitting(config)[0], world_schema(), WIDTH)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [("/".join(str(k.key) for k in path), x.shape) for path, x in leaves]


def example(windows: bool) -> Features:
    """One sample of the world: six event slots (one is padding) and three candidates.

    windows: the candidates have three times, with events between them; else one time.
    """
    times = [-300, -200, -100, 10, 20, 0] if windows else [-500, -400, -300, -200, -100, 0]
    shown = [0, 15, 25] if windows else [0, 0, 0]
    valid = np.arange(6) < 5
    order = [sum(t < now for t in times[:5]) for now in shown]
    abstract = sizes.abstract_features(world_schema(), WIDTH, 1, 6, 3, not windows)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    row = functools.partial(jnp.asarray, dtype=jnp.int32)
    return dataclasses.replace(
        zeros,
        history_sample=row([np.where(valid, 0, -1)]),
        history_time=row([np.where(valid, times, 0)]),
        history_order=row([np.where(valid, np.arange(6) - order[0], 0)]),
        history_action=row([np.where(valid, 1 + np.arange(6) % 3, 0)]),
        candidate_time=row([shown]),
        candidate_order=row([[n - order[0] for n in order]]),
    )


def has_mask(architecture: str) -> bool:
    return hasattr(module_of(architecture), "masks_of")


def masks(config: Any, architecture: str) -> dict[str, tuple[Tokens, Tokens, np.ndarray]]:
    """{title: (queries, keys, allow [N, M])} of a sequence model on `example`."""
    module = module_of(architecture)
    features = example(models.MODELS[architecture].windows)
    found = module.masks_of(config, features)
    return {t: (q, k, np.asarray(rule.allow(q, k)[0])) for t, (q, k, rule) in found.items()}


def picture(name: str, config: Any, architecture: str) -> str:
    """The masks as a page of HTML: a table per layer, a row per query, a column per key."""
    parts = [f"<h1>{markup.escape(name)}: who reads whom</h1>"]
    for title, (q, k, allow) in masks(config, architecture).items():
        keys, queries = _labels(k), _labels(q)
        head = "".join(f"<th><span>{markup.escape(x)}</span></th>" for x in keys)
        lines = [f"<tr><th></th>{head}</tr>"]
        for label, row in zip(queries, allow):
            cells = "".join(f'<td class="{"on" if x else "off"}"></td>' for x in row)
            lines.append(f"<tr><th>{markup.escape(label)}</th>{cells}</tr>")
        parts.append(f"<h2>{markup.escape(title)}</h2><table>{''.join(lines)}</table>")
    return f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style>{"".join(parts)}\n'


_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;color:#1f2937}table{border-collapse:collapse}"
    "td{width:1.4em;height:1.4em;border:1px solid #c9ced8}.on{background:#0072b2}"
    "th{font-weight:normal;text-align:right;padding-right:.5em;white-space:nowrap}"
    "tr:first-child th{padding:0}tr:first-child span{writing-mode:vertical-rl}"
)


def _labels(tokens: Tokens) -> list[str]:
    """ "history 3 at -100": role, position, and the time that the rule compares."""
    labels = []
    for role, position, time in zip(tokens.role[0], tokens.position[0], tokens.time[0]):
        word = ROLES[int(role)]
        if int(role) in (HISTORY, CANDIDATE):
            word += f" {int(position)} at {int(time)}"
        elif int(role) != PAD:
            word += f" {int(position)}"
        labels.append(word)
    return labels


def fidelity() -> str:
    """docs/fidelity.md: per architecture what the paper prints, ours, and what it leaves open."""
    lines = [
        "# Fidelity: what the papers print, what we get, what they leave open",
        "",
        "Made by `rankjax models --fidelity docs/fidelity.md` from the `PAPER` of every file in",
        "`rankjax/models/`; a test holds the figures with a target against their tolerance. Counts",
        "come from shapes alone, so a model of a billion parameters needs no memory.",
    ]
    for module in dict.fromkeys(module_of(name) for name in models.MODELS):
        lines += ["", *_section(module)]
    return "\n".join(lines) + "\n"


def _section(module: ModuleType) -> list[str]:
    paper: papers.Paper = module.PAPER
    names = [name for name in models.MODELS if module_of(name) is module]
    where = f" (arXiv [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))" if paper.arxiv else ""
    lines = [f"## {paper.title}{where}", ""]
    file = module.__name__.rsplit(".", 1)[1]
    lines += [f"`{'`, `'.join(names)}` in [{file}.py](../rankjax/models/{file}.py)."]
    if paper.evidence:
        lines += ["", f"**Evidence.** {paper.evidence}"]
    if paper.sizes:
        lines += ["", "| size | chosen by us |", "|---|---|"]
        lines += [f"| `{n}` | {s.chosen or 'nothing: printed'} |" for n, s in paper.sizes.items()]
    if paper.figures:
        lines += ["", "| figure | printed | ours | deviation | target |", "|---|---|---|---|---|"]
        lines += [_figure_row(figure) for figure in paper.figures]
    for title, pairs, arrow in (
        ("Left open by the paper → our choice", paper.leaves_open, " → "),
        ("Otherwise than the paper, and why", paper.deviations, ": "),
    ):
        if pairs:
            lines += ["", f"**{title}**", ""]
            lines += [f"- {what}{arrow}{ours}" for what, ours in pairs]
    return lines


def _figure_row(figure: papers.Figure) -> str:
    ours = float(figure.ours())
    target = "none" if figure.tolerance is None else f"within {figure.tolerance:.3g}"
    target = "equal" if figure.tolerance == 0 else target
    note = "printed per batch of unsaid size" if figure.per_batch else figure.note
    what = f"{figure.what}, {figure.where}" + (f" ({note})" if note else "")
    deviation = f"{ours / figure.printed - 1:+.2%}"
    if figure.per_batch:
        deviation = f"a batch of {figure.printed / ours:,.0f}"
    return f"| {what} | {figure.printed:,.10g} | {ours:,.10g} | {deviation} | {target} |"
