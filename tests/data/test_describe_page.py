"""The page: all numbers, nothing loaded from elsewhere, nothing of the data as markup."""

import copy
import html.parser
import json
import re

import plotly.graph_objects as go
import pytest

from rankjax.data import describe, describe_page, describe_text, event_log
from tests import tiny


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    path = tiny.log(tmp_path_factory.mktemp("page") / "tiny")
    return describe.describe(event_log.EventLog.open(path))


def parted(summary):
    """The page without plotly.js, and plotly.js."""
    text = describe_page.page(summary)
    scripts = sorted(re.findall(r"<script>.*?</script>", text, flags=re.DOTALL), key=len)
    return text.replace(scripts[-1], ""), scripts[-1]


@pytest.fixture(scope="module")
def page(summary):
    return parted(summary)


def figures(text):
    found = re.findall(r'<script type="application/json">(.*?)</script>', text)
    return [json.loads(spec) for spec in found]


def test_every_table_and_figure_is_there(page, summary):
    text, _ = page
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    tables = describe_text.tables(summary)
    assert titles == [
        *("Impressions by day", "Label rate by day", "Lengths of histories"),
        *tables,
    ]
    for _, rows in tables.values():
        for row in rows:
            assert "".join(f"<td>{cell}</td>" for cell in row) in text


def test_figures_draw_the_days(page, summary):
    by_day, rates, lengths = figures(page[0])
    for trace, (name, counts) in zip(by_day["data"], summary["days"]["spans"].items()):
        assert (trace["name"], trace["y"], trace["x"]) == (name, counts, summary["days"]["day"])
    for trace, (name, x) in zip(rates["data"], summary["days"]["tasks"].items()):
        assert trace["name"] == name
        want = [y / n if n else None for n, y in zip(x["rows"], x["positives"])]
        assert trace["y"] == want
        assert trace["text"][0] == f"{x['positives'][0]} of {x['rows'][0]}"
    train = summary["history"]["train"]
    assert lengths["data"][0]["x"][3] == train["p50"] and lengths["data"][0]["y"][3] == 0.5
    assert lengths["data"][0]["x"][-1] == train["max"] and lengths["data"][0]["y"][-1] == 1.0


def test_plotly_is_there_once_and_nothing_is_loaded(page):
    text, plotly = page
    assert len(plotly) > 10**6 and "plotly.js v" in plotly[:400] and "plotly.js v" not in text
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", text)
    assert "url(" not in text and "default-src 'none'" in text


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_nothing_of_the_log_becomes_markup(summary):
    evil = '</script><img src=x onerror="alert(1)">'
    changed = copy.deepcopy(summary)
    changed["name"] = changed["source"] = evil
    changed["notes"] = [evil]
    changed["id_features"][0]["name"] = changed["tables"][0]["name"] = evil
    changed["tasks"][evil] = changed["tasks"].pop("click")
    changed["days"]["tasks"][evil] = changed["days"]["tasks"].pop("click")
    text, _ = parted(changed)
    tags = Tags()
    tags.feed(text)
    assert "img" not in tags.seen and "onerror" not in tags.attributes
    assert "table" in tags.seen and text.count("&lt;/script&gt;") > 5
    (name,) = [t["name"] for t in figures(text)[1]["data"] if "img" in t["name"]]
    assert "<" not in name


def test_no_text_ends_a_figure():
    evil = "</script><b>"
    text = describe_page._plot(go.Figure(go.Scatter(x=[1], y=[2], name=evil)))
    assert "<b>" not in text and text.count("</script>") == 1
    assert figures(text)[0]["data"][0]["name"] == evil


def test_the_same_summary_gives_the_same_bytes(summary):
    assert describe_page.page(summary) == describe_page.page(copy.deepcopy(summary))
