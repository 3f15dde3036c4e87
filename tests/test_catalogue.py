"""The named sizes, their trees and masks, and the page that is made of the papers' records."""

import pathlib

import numpy as np
import pytest

from rankjax import catalogue, models
from rankjax.batch import CANDIDATE, HISTORY
from rankjax.scaling import presets

FIDELITY = pathlib.Path(__file__).parents[1] / "docs" / "fidelity.md"
MASKED = [name for name in models.MODELS if catalogue.has_mask(name)]


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in catalogue.rows()}


def test_every_row_has_every_column(rows):
    assert {"rankmixer_1b", "hstu_ml1m", "mtgr_small", "onetrans_s"} <= rows.keys()
    for row in rows.values():
        assert tuple(row) == catalogue.COLUMNS
        assert row["architecture"] in models.MODELS
        assert row["dense_params"] > 0 < row["flops"]
        assert row["paper_params"] and row["paper_flops"], row["name"]
    assert not rows.keys() & models.MODELS.keys()  # which `find` would not tell apart
    assert rows["wukong_1_gflop"]["tokens"] == 720 and rows["autoint_criteo"]["tokens"] == 39
    assert (
        "even_split, since" in rows["hiformer_google_play"]["note"]
        and not rows["mtgr_small"]["note"]
    )


def test_what_the_papers_print_is_listed(rows):
    assert rows["rankmixer_1b"]["paper_params"] == 1_208_463_360
    assert rows["mtgr_large"]["paper_flops"] == pytest.approx(55.76e9, rel=1e-3)
    assert rows["mtgr_large"]["n"] == 500
    assert rows["hstu_ml1m"]["paper_params"] == 26_200
    assert (rows["mtgr_large"]["layers"], rows["mtgr_large"]["width"]) == (15, 768)


def test_a_tree_holds_every_parameter():
    config = presets.model("rankmixer", tasks=1)
    leaves = catalogue.tree(config)
    total = sum(int(np.prod(shape)) for _, shape in leaves)
    blocks = sum(int(np.prod(s)) for path, s in leaves if path.startswith("block_"))
    assert blocks == config.paper_params() < total
    text = "\n".join(str(x.label) for x in _nodes(catalogue.as_tree("rankmixer", leaves)))
    assert f"rankmixer: {total:,} dense parameters" in text
    assert f"kernel {list(dict(leaves)['heads/logits/kernel'])}" in text


def _nodes(node):
    yield node
    for child in node.children:
        yield from _nodes(child)


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_a_small_sample(name):
    config, architecture = catalogue.find(name)
    found, seen = catalogue.masks(config, architecture), False
    for q, k, allow in found.values():
        assert allow.shape == (q.role.shape[1], k.role.shape[1])
        candidates = np.asarray(q.role[0]) == CANDIDATE
        seen |= bool(candidates.any())
        assert allow[candidates].any(axis=1).all()
        # No candidate reads an event at or after its own time.
        late = np.asarray(k.time[0])[None, :] >= np.asarray(q.time[0])[:, None]
        late &= (np.asarray(k.role[0]) == HISTORY)[None, :] & candidates[:, None]
        assert not (allow & late).any()
    assert seen  # some table shows what candidates read
    page = catalogue.picture(name, config, architecture)
    cells = sum(allow.size for _, _, allow in found.values())
    assert page.count("<td ") == cells
    assert page.count('class="on"') == sum(int(allow.sum()) for _, _, allow in found.values())


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'rankmixer_2b'.*near it: rankmixer_1b"):
        catalogue.find("rankmixer_2b")


def test_the_page_is_what_the_command_writes():
    assert FIDELITY.read_text(encoding="utf-8") == catalogue.fidelity(), (
        "docs/fidelity.md is old: rankjax models --fidelity docs/fidelity.md"
    )
