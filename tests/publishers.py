"""Files of publishers' layouts, made of random rows: same names, columns, types and oddities."""

import datetime
import pathlib

import numpy as np
import polars as pl

Row = tuple
SHANGHAI = datetime.timezone(datetime.timedelta(hours=8))
LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
)
USER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range,"
) + ",".join(f"onehot_feat{i}" for i in range(18))
PROFILE = (
    "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,"
    "occupation,new_user_class_level "
)


def china(*date: int) -> int:
    """Seconds since 1970 of a time in China."""
    return int(datetime.datetime(*date, tzinfo=SHANGHAI).timestamp())


def write_text(path: pathlib.Path, header: str, rows: list[Row], separator=",") -> pathlib.Path:
    """A file of lines; None is an empty cell, text with the separator in it is quoted."""
    cell = lambda x: "" if x is None else f'"{x}"' if separator in str(x) else str(x)
    lines = [header] * bool(header) + [separator.join(map(cell, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def kuairand(folder: pathlib.Path):
    """KuaiRand-1K: 400 displays at different seconds, videos 40 .. 43 and user 3 of no file.

    Returns files, displays {column: value} in order of time, videos {column: value}.
    """
    rng, first = np.random.default_rng(0), china(2022, 4, 8)
    shown = []
    for second in np.sort(rng.choice(28 * 86_400, 400, replace=False)).tolist():
        click = int(rng.random() < 0.4)
        acts = [click * int(rng.random() < 0.3) for _ in range(4)]
        ids = int(rng.integers(12)), int(rng.integers(44))
        when = 20220408, 900, (first + second) * 1000 + 517
        seen = click * int(rng.random() < 0.5), 1385, 209900, 0, 0, 0, 0
        shown.append((*ids, *when, click, *acts, 0, *seen, int(rng.integers(15))))
    half = sum(row[4] < china(2022, 4, 22) * 1000 for row in shown)
    videos = []
    for v in range(40):
        made = v, v % 3, "NORMAL", f"2022-03-{1 + v % 28:02d}", "ShortImport", 0.0
        length = None if v == 7 else 1000.0 + 100 * v
        tag = (None, "1", "20,43", "1,2,3,4,5")[v % 4]
        music = 9155697141 + v, None if v == 5 else 9.0
        videos.append((*made, length, 720.0, 1280.0, *music, tag))
    users = []
    for u in (0, 1, 2, *range(4, 12)):
        counts = 5, "(0,10]", 3, "[1,10)", 0, "0", 99, "730+"
        hashed = [u % 2 if i not in (4, 12) else None if u == 1 else "1.0" for i in range(18)]
        users.append((u, ("full_active", "UNKNOWN")[u % 2], 0, 0, 1, *counts, *hashed))
    files = [
        write_text(folder / "log_standard_4_08_to_4_21_1k.csv", LOG, shown[:half]),
        write_text(folder / "log_standard_4_22_to_5_08_1k.csv", LOG, shown[half:]),
        write_text(folder / "user_features_1k.csv", USER, users),
        write_text(folder / "video_features_basic_1k.csv", VIDEO, videos),
    ]
    named = lambda header, rows: [dict(zip(header.split(","), row)) for row in rows]
    return files, named(LOG, shown), named(VIDEO, videos)


def yambda(folder: pathlib.Path):
    """Yambda: 600 listens from second 0 on in steps of 5, 50 likes. Returns files and frames."""
    rng, n = np.random.default_rng(1), 600
    columns = {
        "uid": (rng.integers(100, 110, n), pl.UInt32),
        "timestamp": (np.append(0, rng.integers(0, 900, n - 1) * 5), pl.UInt32),
        "item_id": (rng.integers(22, 62, n), pl.UInt32),
        "is_organic": (rng.integers(0, 2, n), pl.UInt8),
        "played_ratio_pct": (rng.integers(0, 120, n), pl.UInt16),
        "track_length_seconds": (rng.integers(1, 60, n) * 5, pl.UInt32),
    }
    listens = pl.DataFrame({name: pl.Series(x, dtype=t) for name, (x, t) in columns.items()})
    listens = listens.sort("uid", "timestamp")
    likes = listens.sample(50, seed=0).with_columns(
        pl.lit("like").alias("event_type"),
        pl.col("timestamp") + 5,
        played_ratio_pct=pl.lit(None, pl.UInt16),
        track_length_seconds=pl.lit(None, pl.UInt32),
    )
    both = pl.concat([listens.with_columns(pl.lit("listen").alias("event_type")), likes])
    kinds = pl.Enum(["listen", "like", "dislike", "unlike", "undislike"])
    both = both.with_columns(pl.col("event_type").cast(kinds)).sort("uid", "timestamp")
    listens.write_parquet(folder / "listens.parquet")
    both.write_parquet(folder / "multi_event.parquet")
    return [folder / "listens.parquet", folder / "multi_event.parquet"], listens, both


def criteo(folder: pathlib.Path):
    """train.txt: 300 rows, counts down to -3, empty cells (None). Returns files and rows."""
    rng = np.random.default_rng(2)
    words = [[f"{x:08x}" for x in rng.integers(2**31, 2**32, 9)] for _ in range(26)]
    rows = []
    for _ in range(300):
        counts = [None if rng.random() < 0.2 else int(x) for x in rng.geometric(0.1, 13)]
        counts[1] = int(rng.integers(-3, 40))
        names = [None if rng.random() < 0.1 else str(rng.choice(w)) for w in words]
        rows.append((int(rng.random() < 0.3), *counts, *names))
    return [write_text(folder / "train.txt", "", rows, separator="\t")], rows


def user_behavior(folder: pathlib.Path) -> list[Row]:
    """UserBehavior.csv: twelve hours, and four rows of other years. Returns the rows in time."""
    rng, first, rows = np.random.default_rng(3), china(2017, 11, 25), []
    for t in np.sort(rng.integers(0, 12 * 3600, 700)).tolist():
        item = int(rng.geometric(0.05))
        behavior = str(rng.choice(["pv", "buy", "cart", "fav"], p=[0.8, 0.05, 0.1, 0.05]))
        rows.append((int(rng.integers(1, 60)), item, 500 + item % 7, behavior, first + t))
    odd = [-2_134_949_234, first - 1, china(2017, 12, 4), 2_122_867_355]
    odd = [(1, 1, 501, "pv", t) for t in odd]
    write_text(folder / "UserBehavior.csv", "", [*odd[:2], *rows, *odd[2:]])
    return rows


def display_ads(folder: pathlib.Path):
    """Ali_Display_Ad_Click: 150 pages of one to four of 40 ads, users 1 .. 9, 9 without profile.

    Returns files, and the rows of raw_sample.csv, ad_feature.csv and behavior_log.csv.
    """
    rng, first = np.random.default_rng(4), china(2017, 5, 6)
    shown = []
    times = rng.choice(8 * 86_400, 150, replace=False)
    times[:2] = 6 * 86_400 - 1, 6 * 86_400  # the last second of a day, and the next one
    for t in np.sort(times).tolist():
        user, page = int(rng.integers(1, 10)), str(rng.choice(["430548_1007", "430539_1007"]))
        for ad in rng.choice(40, rng.integers(1, 5), replace=False).tolist():
            click = int(rng.random() < 0.3)
            shown.append((user, first + t, ad + 1, page, 1 - click, click))
    shown = [shown[i] for i in rng.permutation(len(shown))]
    of = lambda ad: "NULL" if ad % 4 == 0 else ad % 3
    ads = [(ad, ad % 5, ad % 7, ad % 6, of(ad), ad + 0.5) for ad in range(1, 41)]
    level = lambda u: None if u == 2 else 4
    people = [(u, 0, 5, 2, 5, None if u % 2 else 3, 3, 0, level(u)) for u in range(1, 9)]
    behavior = []
    for t in rng.choice(22 * 86_400, 300, replace=False).tolist():
        act = int(rng.integers(1, 10)), first - 14 * 86_400 + t
        what = str(rng.choice(["pv", "cart", "fav", "buy"])), int(rng.integers(8))
        brand = 9 if t >= 20 * 86_400 else int(rng.integers(4))  # a brand of the last days only
        behavior.append((*act, *what, brand))
    sample, feature = (
        "user,time_stamp,adgroup_id,pid,nonclk,clk",
        "campaign_id,customer,brand,price",
    )
    files = [
        write_text(folder / "raw_sample.csv", sample, shown),
        write_text(folder / "ad_feature.csv", f"adgroup_id,cate_id,{feature}", ads),
        write_text(folder / "user_profile.csv", PROFILE, people),
        write_text(folder / "behavior_log.csv", "user,time_stamp,btag,cate,brand", behavior),
    ]
    return files, shown, ads, behavior
