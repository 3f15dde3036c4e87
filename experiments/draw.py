"""Draws the figures of README.md and docs/ from the committed results of the studies.

    python experiments/draw.py

Reads experiments/results/STUDY/results.parquet, writes docs/figures/STUDY.svg; needs matplotlib
(the extra `dev`).
"""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
import polars as pl

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "experiments" / "results", ROOT / "docs" / "figures"
NAMES = {
    "dlrm_mlp": "plain DNN",
    "dcnv2_din": "DCNv2 + DIN",
    "rankmixer": "RankMixer",
    "hstu": "HSTU",
    "dlrm": "DLRM",
    "din": "DIN",
    "autoint": "AutoInt",
    "wukong": "Wukong",
    "transformer": "Transformer",
    "heteroatt": "HeteroAtt",
    "hiformer": "Hiformer",
    "hhft": "HHFT",
    "tokenmixer_large": "TokenMixer-Large",
    "dlrm_v3": "DLRM-v3",
    "mtgr": "MTGR",
    "grab": "GRAB",
    "longer": "LONGER",
    "onetrans": "OneTrans",
}
COLORS = {"dlrm_mlp": "#7f7f7f", "dcnv2_din": "#2a9d8f", "rankmixer": "#d1495b", "hstu": "#30638e"}
COLORS |= {
    name: matplotlib.colormaps["tab20"](place)
    for place, name in enumerate(n for n in NAMES if n not in COLORS)
}
LINES = {"all": "-", "T": ":", "S": ":", "L": "--", "D": "-"}


def draw(study: str, title: str, axis: str | None = None) -> pathlib.Path:
    """Test NE against training FLOPs: a panel a budget, a line a ladder, bars over seeds.

    axis: only the ladders along it.
    """
    rows = pl.read_parquet(RESULTS / study / "results.parquet").filter(pl.col("stage") == "final")
    if axis is not None:
        rows = rows.filter(pl.col("axis") == axis)
    budgets = sorted(rows["budget"].unique().to_list())
    figure, panels = plt.subplots(
        1, len(budgets), figsize=(4.6 * len(budgets), 3.8), sharey=True, squeeze=False
    )
    for panel, budget in zip(panels[0], budgets):
        for (name, axis), own in (
            rows.filter(pl.col("budget") == budget)
            .sort("architecture", "axis")
            .group_by("architecture", "axis", maintain_order=True)
        ):
            sizes = own.group_by("axis_value").agg(
                pl.col("training_flops").mean(),
                pl.col("test_ne").mean(),
                pl.col("test_ne").std().alias("std"),
            )
            sizes = sizes.sort("training_flops")
            panel.errorbar(
                sizes["training_flops"], sizes["test_ne"], sizes["std"], marker="o", markersize=4,
                linestyle=LINES[axis], color=COLORS[name], label=f"{NAMES[name]}, {axis}",
                elinewidth=0.8, linewidth=1.4,
            )  # fmt: skip
        panel.set(xscale="log", xlabel="training FLOPs", title=f"{budget:,} impressions")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("test NE (lower is better)")
    panels[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"{study.replace('/', '_')}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "rankjax"  # the same bytes every time
    print(draw("ebnerd_axes", "EB-NeRD demo: the next week's clicks"))
    print(draw("movielens_architectures", "MovieLens-1M: ratings of 4 or more"))
    print(draw("world_gap", "The synthetic world of 550,000 impressions"))
    for name, title in (("world", "The synthetic world"), ("ebnerd", "EB-NeRD demo")):
        if (RESULTS / "all_architectures" / name).exists():
            print(draw(f"all_architectures/{name}", f"{title}: all axes at once", axis="all"))
