"""Which column of a file plays which role, guessed from names and the first rows."""

import dataclasses
import re
from typing import Literal

import polars as pl

from rankjax.data.own import glance

Kind = Literal["impressions", "ratings", "events", "lists", "users", "items", ""]

_ID = r"(_?id|_(idx|no|num|number|key|code|hash|uuid|guid))"
_USERS = "user|member|customer|visitor|reader|viewer|client|account|profile|person|player|device"
_ITEMS = (
    "item|article|news|movie|video|adgroup|ad|creative|product|goods|sku|song|track|artist|photo|"
    "post|note|content|document|doc|book|anime|game|app|listing|prop|hotel|job|offer|recipe|"
    "restaurant|business|poi|venue|campaign|url|page"
)
_ACTED = "((click|clicked|target|candidate|shown|impressed)_)?"
# In order of preference; the words of a name are parted by "_" (glance.plain).
USER = (rf"user{_ID}", r"u_?id", rf"({_USERS}){_ID}", r"user", r"customer|visitor|cookie")
ITEM = (
    rf"{_ACTED}item{_ID}",
    rf"{_ACTED}({_ITEMS}){_ID}",
    r"i_?id|asin|isbn|sku|parent_asin",
    r"item|article|movie|video|product|track|song",
)
REQUEST = (
    rf"request{_ID}",
    rf"(impression|imp){_ID}",
    rf"(search|srch|query|slate|list|auction|display|page_?view|pv){_ID}",
    rf"(session|visit){_ID}",
)
REQUEST_WORD = (r"request|page_?view|session|visit|slate",)  # if its rows share user and time
POSITION = (r"(item_|display_|list_|screen_)?(position|pos|rank|slot)",)
SPLIT = (r"split|subset|partition|fold|phase|data_?set|set|part",)
TIME = (
    r"(event_|server_|unix_|epoch_)?(timestamp|time_stamp|datetime|date_time|unix_?time)(_(s|ms|us|ns))?",
    r"(event|click|clicked|impression|request|view|rating|server|action|log)_(time|timestamp|ts|at|date)",
    r"time|ts|t|at|time_(s|ms|us|ns)",
    r".*_(time|timestamp|ts|at|datetime)(_(s|ms|us|ns))?|.*_?date|date|day|(created|updated)_.*",
    r"(timestamp|time)_(utc|gmt|local|hi|lo)",
)
BIRTH = (
    r"((publish(ed)?|publication|upload(ed)?|released?|creat(e|ed|ion)|birth|listed|"
    r"launch(ed)?|start)_?(time|date|dt|at|on|timestamp|ts|day)?|(first|online)_(seen|date|time))",
)
_FLAG = (
    "click|clicks|clicked|clk|label|labels|target|y|like|likes|liked|follow|followed|share|shared|"
    "forward|comment|commented|purchase|purchased|buy|bought|conversion|converted|convert|cart|"
    "add_to_cart|favorite|fav|save|saved|install|installed|order|ordered|booking|booked|finish|"
    "finished|long_view|effective_view|valid_read|download|downloaded|reply|response|reward|hate"
)
LABEL = (rf"(is_|has_|did_|user_)?({_FLAG})(_(flag|label|bool|ind|yn))?|label_.*|.*_label",)
RATING = (r"(user_|movie_|item_|review_)?(rating|ratings|score|stars|overall)",)
HISTORY = (r".*(history|hist|clicked|past|sequence|seq|behaviou?rs?|fixed).*",)
# What happened after the impression, or how the old system chose: no input of a ranker.
OUTCOME = (
    r"(.*_)?(next|after|post|dwell|scroll|watch|watched|stay|played|listen|listened|spent|revenue|"
    r"gmv|profit|converted|conversion|attribution|propensity|pscore|completion)(_.*)?",
    r"(logging_|behaviou?r_|old_)?policy",
    r"(.*_)?(read|reading|view|viewing|play|playing|engagement)_(time|duration|ratio|percentage|ms)(_.*)?",
)
# Of a whole visit, so not even known when the visit's next event comes.
LATER = (r"(session|visit)_(size|length|len|clicks|duration|end|count)",)
ACTION = (r"(event|action|behaviou?r|btag|activity)(_?(type|name|code))?|type|verb",)


@dataclasses.dataclass(frozen=True, eq=False)
class Roles:
    """Columns by role; empty where none plays it. clock: how `time` tells time. birth: of items.

    Several columns for user or item mean all of them together.
    """

    user: tuple[str, ...] = ()
    item: tuple[str, ...] = ()
    time: str = ""
    clock: glance.Clock | None = None
    request: str = ""
    position: str = ""
    split: str = ""
    labels: tuple[str, ...] = ()
    rating: str = ""
    history: str = ""
    birth: str = ""


def matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that fit a pattern wholly, those of the first pattern first."""
    found: dict[str, None] = {}
    for pattern in patterns:
        fits = [n for n in names if re.fullmatch(pattern, glance.plain(n))]
        found |= dict.fromkeys(fits)
    return list(found)


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return bool(matching([name], patterns))


def is_id(x: pl.Series) -> bool:
    """Whole numbers or text: what an import takes as an id."""
    return x.dtype.is_integer() or x.dtype in (pl.String, pl.Categorical, pl.Enum)


def is_binary(x: pl.Series) -> bool:
    if x.dtype == pl.Boolean:
        return not x.null_count()
    return x.dtype.is_numeric() and not x.null_count() and bool(((x == 0) | (x == 1)).all())


def roles_of(seen: glance.Glance) -> Roles:
    """The roles of one file's columns, whatever the file is."""
    frame, names = seen.frame, seen.frame.columns
    ids = [n for n in names if is_id(frame[n])]
    stem = glance.plain(seen.path.name.split(".")[0])
    user = matching(ids, USER)[:1]
    item = [n for n in matching(ids, ITEM) if n not in user][:1]
    if not user and not item and (bare := matching(ids, (r"id|index",))):
        if re.search(rf"(^|_)({_USERS})s?(_|$)", stem):
            user = bare[:1]
        elif re.search(rf"(^|_)({_ITEMS})s?(_|$)", stem):
            item = bare[:1]
    labels = [n for n in matching(names, LABEL) if is_binary(frame[n]) and n not in seen.gaps]
    if not user and labels:  # whoever looks alike is one user
        user = [n for n in ids if re.fullmatch(r"user_.*", glance.plain(n)) and n not in labels]
    rating = [n for n in matching(names, RATING) if _is_rating(frame[n])]
    births = {n: c for n in matching(names, BIRTH) if (c := glance.clock(frame[n]))}
    time, clock = _time(seen, [n for n in names if n not in births])
    if not time:
        time, clock = _time(seen, list(births))
    history = [n for n in matching(names, HISTORY) if _is_id_list(frame[n])]
    free = set(names) - {*user, *item, *labels, *rating, time}
    position = [n for n in matching(ids, POSITION) if n in free and frame[n].dtype.is_integer()]
    named = matching(ids, (*REQUEST, *REQUEST_WORD))
    request = [n for n in named if n in free and _is_request(frame, n, user, time)]
    split = [n for n in matching(names, SPLIT) if n in free and spans(seen, n)]
    return Roles(
        user=tuple(user),
        item=tuple(item),
        time=time,
        clock=clock,
        request=next(iter(request), ""),
        position=next(iter(position), ""),
        split=next(iter(split), ""),
        labels=tuple(labels),
        rating=next(iter(rating), ""),
        history=next(iter(history), ""),
        birth=next(iter(births), ""),
    )


def _is_rating(x: pl.Series) -> bool:
    known = x.drop_nulls()
    if not x.dtype.is_numeric() or len(known) < len(x) or not len(x):
        return False
    return bool(known.is_between(0, 100).all()) and 2 < known.n_unique() <= 101


def _is_id_list(x: pl.Series) -> bool:
    inner = getattr(x.dtype, "inner", None)
    return isinstance(x.dtype, pl.List) and (inner.is_integer() or inner == pl.String)


def _time(seen: glance.Glance, names: list[str]) -> tuple[str, glance.Clock | None]:
    """The column whose name and values say when it happened: complete, the finest of the best."""
    found = []
    for rank, pattern in enumerate(TIME):
        for name in matching(names, (pattern,)):
            if fits(name, OUTCOME) and not fits(name, TIME[:3]):
                continue
            clock = glance.clock(seen.frame[name])
            if clock is not None:
                found.append((name in seen.gaps, clock.whole_days, rank, name, clock))
    if not found:
        for name in matching(names, (TIME[0], TIME[2])):
            if (relative := glance.relative_clock(seen.frame[name])) is not None:
                return name, relative
        return "", None
    best = min(found, key=lambda x: x[:3])
    return best[3], best[4]


def _is_request(frame: pl.DataFrame, name: str, user: list[str], time: str) -> bool:
    """Whether rows share its values, and rows that do share user and time."""
    if frame[name].null_count() or frame[name].n_unique() == frame.height:
        return False
    shared = [*user, *([time] if time else [])]
    if not shared:
        return True
    alike = frame.group_by(name).agg(pl.col(c).n_unique().alias(f"@{c}") for c in shared)
    return bool((alike.drop(name).max_horizontal() == 1).all())


TRAIN, VALIDATION, TEST = (
    r"(train|training|tr)",
    r"(validation|valid|val|dev|eval)",
    r"(test|testing|te|holdout)",
)


def spans(seen: glance.Glance, name: str) -> dict[str, list[str]]:
    """{"train_values": [...], ...} of a split column; empty where its values are no split.

    Where it names two spans only, the second is the test.
    """
    x = seen.frame[name]
    if x.dtype != pl.String or x.null_count():
        return {}
    values = {*x.unique(), *(v for v in seen.bounds.get(name, ()) if isinstance(v, str))}
    of = {
        key: sorted(v for v in values if re.fullmatch(pattern, v.lower()))
        for key, pattern in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
    }
    if sum(map(len, of.values())) < len(values) or not of["train"]:
        return {}
    if not of["test"]:
        of["test"], of["validation"] = of["validation"], []
    return {f"{k}_values": v for k, v in of.items() if v} if of["test"] else {}


def kind_of(frame: pl.DataFrame, roles: Roles) -> Kind:
    """What a file with these roles is; "" where it fits nothing."""
    if roles.labels and (roles.item or not roles.user or roles.time):
        return "impressions"
    if roles.user and roles.history and not roles.item:
        return "lists"
    listed = bool(roles.birth) and roles.time == roles.birth  # by whom, and when
    if roles.user and roles.item and roles.time and not (listed and _distinct(frame, roles.item)):
        return "ratings" if roles.rating else "events"
    if roles.user and roles.time and not roles.item and matching(frame.columns, ACTION):
        return "events"
    if roles.item and (not roles.user or _distinct(frame, roles.item)):
        return "items"
    return "users" if roles.user and _distinct(frame, roles.user) else ""


def _distinct(frame: pl.DataFrame, columns: tuple[str, ...]) -> bool:
    return frame.select(columns).n_unique() == frame.height


def item_key(frame: pl.DataFrame, roles: Roles, shown: list[str]) -> tuple[str, ...]:
    """The columns that name one row of an items file: its id, and as many of those that the
    impressions have too (`shown`) as it takes; empty where even all do not."""
    (own,) = roles.item
    if _distinct(frame, roles.item):
        return (own,)
    key = [c for c in frame.columns if c == own or (c in shown and is_id(frame[c]))]
    if not _distinct(frame, tuple(key)):
        return ()
    for column in [c for c in key if c != own]:  # without those that it does not take
        fewer = tuple(c for c in key if c != column)
        if _distinct(frame, fewer):
            key = list(fewer)
    return tuple(key)
