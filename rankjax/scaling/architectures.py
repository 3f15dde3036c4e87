"""The table of architectures, on the page and in a terminal, with the trees as one more row."""

from rankjax.scaling import markup

TREES = "trees (scikit-learn)"
NOT_RUN = (
    "trees not run: the study's folder holds no baseline.json; pip install 'rankjax[baseline]', "
    "then rankjax baseline LOG --study STUDY"
)
HEAD = (
    *("rank", "architecture", "size", "dense params", "training FLOPs", "test NE"),
    *("NE − plain DNN", "NE − oracle", "test AUC", "test AUC within requests"),
)


def section(summed: dict) -> str:
    """The summary -> HTML: a row an architecture, the trees where their test NE puts them."""
    rows = _rows(summed)
    if not rows:
        return markup.note("No final trial has a test NE.") + _notes(summed)
    spread = summed["seed_spread"]["ne"]
    freedom = spread["degrees_of_freedom"]
    noise = (
        f"Ties: less than the seed spread explains at 5% (pooled std of NE {spread['std']:.5f}, "
        f"{freedom} degrees of freedom)."
        if freedom
        else "No size has two seeds, so ties cannot be told (marked ?)."
    )
    explained = markup.note(
        "Per architecture the size with the lowest validation NE at the largest budget; the "
        f"numbers are on test. {noise}"
    )
    if summed["trees"] is not None:
        rows.append((summed["trees"]["test_ne"], _trees_cells(summed)))
        rows.sort(key=lambda row: float("inf") if row[0] is None else row[0])
    return markup.table(HEAD, [cells for _, cells in rows]) + explained + _notes(summed)


def lines(summed: dict) -> list[str]:
    """The same for a terminal: a line an architecture, then the trees and what to know of them."""
    trees, found = summed["trees"], summed["architectures"]
    names = [row["architecture"] for row in found] + ([TREES] if trees else [])
    width = max(map(len, names), default=0)
    out = []
    for row in found:
        parts = [f"{row['architecture']:<{width}}", f"test NE {markup.spread(row, 'test_ne')}"]
        parts.append(f"AUC {markup.spread(row, 'test_auc')}")
        if row["test_request_auc"] is not None:
            parts.append(f"within requests {markup.spread(row, 'test_request_auc')}")
        parts.append(f"{markup.short(row['training_flops'])} training FLOPs")
        out.append("  ".join(parts + ["(ties with the first)"] * bool(row["tied_with_first"])))
    if trees is not None:
        parts = [f"{TREES:<{width}}", f"test NE {markup.number(trees['test_ne'])}"]
        parts.append(f"AUC {markup.number(trees['test_auc'])}")
        if trees["test_request_auc"] is not None:
            parts.append(f"within requests {markup.number(trees['test_request_auc'])}")
        out.append("  ".join(parts))
    return out + remarks(summed)


def remarks(summed: dict) -> list[str]:
    """What a reader must know of the trees: that they were not run, or what held them back."""
    trees = summed["trees"]
    if trees is None:
        return [NOT_RUN]
    out = []
    if trees["rows"] < trees["rows_asked"]:
        out.append(
            f"trees: learned from the newest {trees['rows']:,} of {trees['rows_asked']:,} "
            "impressions, to bound memory"
        )
    if trees["iterations"] == trees["config"]["iterations"]:
        out.append(
            f"trees: the last of {trees['iterations']} iterations was best on validation; more may "
            "be better"
        )
    return out


def _notes(summed: dict) -> str:
    return "".join(markup.note(f"{text[0].upper()}{text[1:]}.") for text in remarks(summed))


def _rows(summed: dict) -> list[tuple[float | None, list[str]]]:
    """(test NE, cells) of each architecture, best first."""
    rows, place = [], 1
    for i, row in enumerate(summed["architectures"], 1):
        place = place if row["tied_with_first"] else i
        tie = row["tied_with_first"]
        rank = f"{place}" + (" (tie)" if tie else "") + (" ?" if tie is None else "")
        plain = " · plain DNN" if row["architecture"] == summed["baseline"] else ""
        sizes = zip(("T/S", "L", "D"), (row["tokens"], row["layers"], row["width"]))
        cells = [rank, row["architecture"] + plain]
        cells.append(", ".join(f"{n} {v:g}" for n, v in sizes if v is not None))
        cells += [markup.short(row[c]) for c in ("dense_params", "training_flops")]
        cells += [markup.spread(row, "test_ne"), _signed(row["ne_to_baseline"])]
        cells.append(markup.number(_minus(row["test_ne"], summed["oracle_ne"])))
        cells += [markup.spread(row, f"test_{m}") for m in ("auc", "request_auc")]
        rows.append((row["test_ne"], cells))
    return rows


def _trees_cells(summed: dict) -> list[str]:
    trees, first = summed["trees"], summed["architectures"][0]
    plain = _minus(first["test_ne"], first["ne_to_baseline"])
    size = f"{trees['iterations']} trees of {trees['config']['leaves']} leaves"
    cells = ["–", TREES, f"{size}, {trees['features']} columns", "–", "–"]
    cells += [markup.number(trees["test_ne"]), _signed(_minus(trees["test_ne"], plain))]
    cells.append(markup.number(_minus(trees["test_ne"], summed["oracle_ne"])))
    return cells + [markup.number(trees[f"test_{m}"]) for m in ("auc", "request_auc")]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"
