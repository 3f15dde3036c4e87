"""The process of the synthetic world: a block of users advances request by request.

A block is the unit of randomness and of parallel work: its bytes depend on the configuration and
its number only. No BLAS stands on the path to a label (its sums change with the threads); the
probabilities, and the comparisons of uniform draws with them, are in float64.

Letters: U users of the block, n users still active (a prefix, because users are sorted by their
number of requests), P shown candidates of a round, in order of (user, position).
"""

import dataclasses

import numpy as np

from rankjax.data.sources import world_tables
from rankjax.data.sources.world_tables import DAY, HOUR, Cross, Tables, World

SHOWN = 16  # most candidates of a request
DRAWN = 22  # shelves drawn for a request, before duplicates are dropped
RING = 8  # last positives that candidates are personalised by
PARTS = (
    *("loyalty", "interest", "taste", "cross", "sequence", "item", "user", "position"),
    "satiation",
)
SLICE = 256  # candidates whose crosses are evaluated at once: their [256, M] stays in the cache


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """float64, whatever the logit's dtype."""
    return 1.0 / (1.0 + np.exp(-logit.astype(np.float64)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """What happened to the users of one block; ids are 0-based and local, times in seconds.

    users: {field: [U]}. requests: how many request numbers the block used (some lie past the
    horizon and were dropped). impressions: {column: [N]}, sorted by (time, request, position),
    with `part_*` float32 columns if asked for. events: {column: [E]}, sorted by (user, time).
    """

    users: dict[str, np.ndarray]
    requests: int
    impressions: dict[str, np.ndarray]
    events: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Users:
    feature: dict[str, np.ndarray]  # [U]
    requests: np.ndarray  # [U]
    first: np.ndarray  # [U] number of the first request; a user's requests follow each other
    time: np.ndarray  # [requests] s, float64 of whole numbers
    surface: np.ndarray  # [requests]
    size: np.ndarray  # [requests] candidates wanted
    taste: np.ndarray  # [U, dim]
    known_taste: np.ndarray  # [U, dim], its mean given the user's features
    bias: np.ndarray  # [U]


def _draw_users(c: World, W: Tables, g: np.random.Generator, U: int) -> _Users:
    """Who the block's users are and when they come."""
    feature = {}
    for name, n in world_tables.USER.items():
        weight = 1 / np.arange(2, n + 2.0) ** 0.6
        feature[name] = g.choice(n, U, p=weight / weight.sum()).astype(np.int16)
    H = c.horizon
    start = np.where(g.random(U) < 0.7, 0, g.random(U) * 0.95 * H)
    leaves = g.random(U) >= 0.7
    end = np.where(leaves, np.minimum(H, start + 2 * DAY + g.exponential(0.4 * H, U)), H)
    requests = np.exp(g.normal(0, 1.0, U) - 0.5) * c.requests * (end - start) / H
    requests = np.clip(np.ceil(requests), 2, 8 * c.requests).astype(np.int64)
    time = _request_times(c, g, requests, start, end, feature["age"])
    N = len(time)
    surface = g.choice(world_tables.CONTEXT["surface"], N, p=[0.4, 0.25, 0.15, 0.12, 0.08])
    size = g.integers(4, 17, N)
    own = g.normal(size=(U, c.dim))
    known = 0.8 * W.segment[feature["segment"]] + 0.4 * W.country[feature["country"]]
    return _Users(
        feature=feature,
        requests=requests,
        first=np.cumsum(requests) - requests,
        time=time,
        surface=surface.astype(np.int16),
        size=size,
        taste=((known + 0.45 * own) * W.spectrum).astype(np.float32),
        known_taste=(known * W.spectrum).astype(np.float32),
        bias=g.normal(size=U).astype(np.float32),
    )


def _request_times(
    c: World,
    g: np.random.Generator,
    requests: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    age: np.ndarray,
) -> np.ndarray:
    """Times of all requests, user by user, ascending, >= 60 s apart; some lie past the horizon."""
    H, U, N = c.horizon, len(requests), int(requests.sum())
    owner = np.repeat(np.arange(U), requests)
    is_first = np.zeros(N, bool)
    is_first[np.cumsum(requests) - requests] = True
    new = (g.random(N) < 1 / 4) | is_first  # sessions of 4 requests on average
    session, o = np.cumsum(new) - 1, owner[new]
    opens = start[o] + np.floor(g.random(o.size) * np.maximum(1, (end - start)[o] / DAY)) * DAY
    opens = np.floor(opens / DAY) * DAY + ((g.normal(0, 3.5, o.size) + 12 + age[o]) % 24) * HOUR
    gap = 60 + g.exponential(150, N)
    gap[new] = 0
    since = np.cumsum(gap)
    time = np.clip(np.floor(opens[session] + since - since[new][session]), 0, H - 1)
    time = time[np.lexsort((time, owner))]
    # A cumulative maximum of t - 60 k pushes requests apart; owner * 4 H keeps the users apart.
    shift = owner * 4.0 * H - 60 * np.arange(N)
    return np.maximum.accumulate(time + shift) - shift


class _State:
    """What a user's past means for the next request; rows in order of falling request counts."""

    def __init__(self, c: World, U: int):
        self.scales, self.loyalty = np.array(c.scales, float), c.loyalty_days * DAY
        self.num = np.zeros((U, len(c.scales), c.dim), np.float32)
        self.den = np.zeros((U, len(c.scales)), np.float32)
        self.satiation = np.zeros((U, world_tables.ITEM["category"]), np.float32)
        self.loyal = np.zeros((U, c.creators), np.float32)
        self.ring = np.full((U, RING), -1, np.int64)  # newest first
        self.clock, self.last = np.zeros(U), np.full(U, -np.inf)

    def advance(self, time: np.ndarray) -> None:
        """Lets the first n users' memories fade until their next request's time [n]."""
        n = len(time)
        passed = time - self.clock[:n]
        self.clock[:n] = time
        decay = np.exp(-passed[:, None] / self.scales).astype(np.float32)
        self.num[:n] *= decay[:, :, None]
        self.den[:n] *= decay
        self.loyal[:n] *= np.exp(-passed / self.loyalty).astype(np.float32)[:, None]
        self.satiation[:n] *= np.exp(-passed / (2 * HOUR)).astype(np.float32)[:, None]

    def add(self, W: Tables, row: np.ndarray, item: np.ndarray, like: np.ndarray) -> None:
        """Takes in the positives of a round, [E] in order of (row, position)."""
        weight = 1 + like.astype(np.float32)
        n = int(row[-1]) + 1 if len(row) else 0
        gain = np.zeros((n, self.num.shape[2]), np.float32)
        np.add.at(gain, row, weight[:, None] * W.factors[item])
        self.num[:n] += gain[:, None]
        self.den[:n] += np.bincount(row, weight, n).astype(np.float32)[:, None]
        np.add.at(self.loyal, (row, W.feature["creator"][item]), 1)
        np.add.at(self.satiation, (row, W.feature["category"][item]), 1)
        nth = np.arange(len(row)) - np.searchsorted(row, row)  # of the row's positives
        for k in range(nth.max(initial=-1) + 1):
            new = row[nth == k]
            self.ring[new, 1:] = self.ring[new, :-1]
            self.ring[new, 0] = item[nth == k]
        self.last[row] = self.clock[row]


def _candidates(
    c: World, W: Tables, g: np.random.Generator, ring: np.ndarray, time: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Items [n, SHOWN], distinct ones first, and how many are distinct [n]."""
    n = len(time)
    source, u = g.random((n, DRAWN)), g.random((n, DRAWN))
    liked = ring[np.arange(n)[:, None], g.integers(0, RING, (n, DRAWN))]
    # Shelves are sorted by category: popular, and popular within a category, are both one search
    # in the cumulative popularity.
    category = W.feature["category"][liked]
    low, high = (W.popularity[W.category_start[category + k]] for k in (0, 1))
    personal = (source < c.mix[1]) & (liked >= 0)
    mass = np.where(personal, low + u * (high - low), u * W.popularity[-1])
    slot = np.searchsorted(W.popularity, mass, side="right") - 1
    slot = np.where(source > 1 - c.mix[2], (u * c.slots).astype(np.int64), slot)
    item = W.occupant(np.clip(slot, 0, c.slots - 1), time[:, None])
    order = np.argsort(item, 1, kind="stable")
    ordered = np.take_along_axis(item, order, 1)
    again = np.zeros((n, DRAWN), bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    keep = np.argsort(again, 1, kind="stable")[:, :SHOWN]  # distinct ones first, as drawn
    return np.take_along_axis(item, keep, 1), (~again).sum(1)


class _Crosses:
    """Evaluates one Cross for a block's users; [U, M] of their own fields is computed once."""

    def __init__(self, c: World, cross: Cross, user: dict[str, np.ndarray], *, sequence: bool):
        weight = c.recency ** np.arange(world_tables.BLEND)
        weight = (weight / np.sqrt((weight**2).sum())).astype(np.float32)
        rest = np.float32(1 - weight.sum())
        self.cross, self.sequence = cross, sequence
        U = len(user["segment"])
        self.user = np.broadcast_to(cross.amplitude, (U, len(cross.amplitude))).copy()
        for name in world_tables.USER:
            self.user *= cross.fields[name][user[name]]
        # A blended field is phi_mean + sum_k r_k (phi(x_k) - phi_mean), r = `weight`: blending
        # the tables themselves would inflate terms that lack the field, whose phi is 1.
        self.blended = {
            name: (rest * cross.fields[name].mean(0), [w * cross.fields[name] for w in weight])
            for name in world_tables.BLENDED
        }

    def __call__(
        self,
        request: dict[str, np.ndarray],
        recent: dict[str, list[np.ndarray]],
        row: np.ndarray,
        combination: np.ndarray,
    ) -> np.ndarray:
        """request {field: [n]}, recent {field: BLEND x [n]} -> [P] float32."""
        n = len(request["surface"])
        x = self.user[:n].copy()
        for name in (*world_tables.CONTEXT, *(("gap",) if self.sequence else ())):
            x *= self.cross.fields[name][request[name]]
        for name in ("last", "last2", "last_format", "last_language"):
            if name in self.blended:
                mean, tables = self.blended[name]
                x *= mean + sum(table[v] for table, v in zip(tables, recent[name]))
            else:
                x *= self.cross.fields[name][request[name]]
        out = np.empty(len(row), np.float32)
        for start in range(0, len(row), SLICE):
            part = slice(start, start + SLICE)
            y = self.cross.item[combination[part]]
            np.einsum("pm,pm->p", x[row[part]], y, out=out[part])
        return out - self.cross.mean


def simulate(c: World, number: int, *, parts: bool) -> Block:
    """All users of block `number`, from first to last request."""
    W, g = world_tables.tables(c), world_tables.generator(c.seed, 1, number)
    U = min(c.block, c.users - number * c.block)
    users = _draw_users(c, W, g, U)
    rounds = _Rounds(c, W, g, users, parts)
    for r in range(int(users.requests.max())):
        rounds.advance(r)
    impressions, events = _joined(rounds.impressions), _joined(rounds.events)
    order = np.lexsort((impressions["position"], impressions["request"], impressions["time"]))
    impressions = {name: x[order] for name, x in impressions.items()}
    order = np.lexsort((events["time"], events["user"]))
    events = {name: x[order] for name, x in events.items()}
    return Block(
        users=users.feature, requests=len(users.time), impressions=impressions, events=events
    )


def _joined(rounds: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([r[name] for r in rounds]) for name in rounds[0]}


class _Rounds:
    """Round r holds the r-th request of every user that has one."""

    def __init__(self, c: World, W: Tables, g: np.random.Generator, users: _Users, parts: bool):
        self.c, self.W, self.g, self.users, self.parts = c, W, g, users, parts
        # Most requests first: those still active are a prefix, and their state is a view.
        self.order = np.argsort(-users.requests, kind="stable")
        self.falling = -users.requests[self.order]
        sorted_users = {name: x[self.order] for name, x in users.feature.items()}
        self.state = _State(c, len(self.order))
        self.click = _Crosses(c, W.click, sorted_users, sequence=False)
        self.sequence = _Crosses(c, W.sequence, sorted_users, sequence=True)
        self.like = _Crosses(c, W.like, sorted_users, sequence=False)
        self.impressions: list[dict[str, np.ndarray]] = []
        self.events: list[dict[str, np.ndarray]] = []

    def advance(self, r: int) -> None:
        c, W, g, users, state = self.c, self.W, self.g, self.users, self.state
        n = int(np.searchsorted(self.falling, -r, side="left"))  # users with more than r requests
        user = self.order[:n]
        request = users.first[user] + r
        time = users.time[request]
        state.advance(time)
        item, distinct = _candidates(c, W, g, state.ring[:n], time)
        shown = np.minimum(users.size[request], distinct) * (time < c.horizon)
        row, position = np.nonzero(np.arange(SHOWN) < shown[:, None])
        weight = np.array(c.scale_weights, np.float32)[:, None]
        e = (state.num[:n] / (c.shrink + state.den[:n])[:, :, None] * weight).sum(1)
        item, interest = self._ranked(e, item[row, position], row, position)
        p = self._probabilities(user, request, row, position, item, interest)
        # The only noise. Drawn for hidden candidates too, so that the stream has fixed strides.
        click = g.random((n, SHOWN))[row, position] < p["p_click"]
        like = (g.random((n, SHOWN))[row, position] < p["p_like"]) & click
        at = time[row].astype(np.int64)
        self.impressions.append(
            {
                **{"user": user[row], "request": request[row], "time": at, "position": position},
                **{"item": item, "surface": users.surface[request][row]},
                **{"click": click, "like": like, **p},
            }
        )
        # Logged strictly before the next request, which is at least 60 s later.
        seen = at[click] + 2 * (position[click] + 1)
        action = 1 + 2 * like[click].astype(np.int32)
        self.events.append(
            {"user": user[row][click], "time": seen, "item": item[click], "action": action}
        )
        state.add(W, row[click], item[click], like[click])

    def _ranked(
        self, e: np.ndarray, item: np.ndarray, row: np.ndarray, position: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The production ranker: noisy, correlated with interest. Reorders [P] within requests."""
        n = len(e)
        interest = (e[row] * self.W.factors[item]).sum(-1)
        gumbel = self.g.gumbel(size=(n, SHOWN))[row, position]
        key = -1.5 * interest - 0.15 * self.W.log_popularity[item] + gumbel
        order = np.lexsort((position, key, row))
        return item[order], interest[order]

    def _fields(self, user: np.ndarray, request: np.ndarray) -> tuple[dict, dict]:
        """What the crosses read of the requests: {field: [n]}, {blended field: BLEND x [n]}."""
        n, feature, state = len(user), self.W.feature, self.state
        time = self.users.time[request]

        def value(name: str, k: int) -> np.ndarray:
            item = state.ring[:n, k]  # the k-th last positive; -1 reads any value and gives 0
            return np.where(item >= 0, feature[name][item] + 1, 0)

        gap = 1 + np.searchsorted(world_tables.GAPS, time - state.last[:n])
        fields = {
            "surface": self.users.surface[request],
            "daypart": (time // (3 * HOUR) % 8).astype(np.int16),
            "weekday": (time // DAY % 7).astype(np.int16),
            "gap": np.where(np.isfinite(state.last[:n]), gap, 0),
            "last2": value("category", 1),
        }
        blended = world_tables.BLENDED.items()
        return fields, {k: [value(v, i) for i in range(world_tables.BLEND)] for k, v in blended}

    def _probabilities(
        self,
        user: np.ndarray,
        request: np.ndarray,
        row: np.ndarray,
        position: np.ndarray,
        item: np.ndarray,
        interest: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """p_click, p_like given click, p_known (the user's latents at their mean), parts: [P]."""
        c, W, users, state = self.c, self.W, self.users, self.state
        fields, recent = self._fields(user, request)
        at = (fields, recent, row, W.combination[item])
        v, category = W.factors[item], W.feature["category"][item]
        age = np.log1p((users.time[request][row] - W.birth[item]) / DAY).astype(np.float32)
        count = state.loyal[row, W.feature["creator"][item]]
        slope = -c.gain_position * W.position_slope[users.surface[request]]
        quality = W.quality[item]
        part = {
            "loyalty": c.gain_loyalty * count / (c.loyalty_half + count),
            "interest": c.gain_interest * interest,
            "taste": c.gain_taste * (users.taste[user][row] * v).sum(-1),
            "cross": c.gain_cross * self.click(*at),
            "sequence": c.gain_sequence * self.sequence(*at),
            "item": c.gain_item * quality - c.gain_fresh * age,
            "user": c.gain_user * users.bias[user][row],
            "position": slope[row] * np.log2(1 + position.astype(np.float32)),
            "satiation": -c.gain_satiation * np.minimum(state.satiation[row, category], 3),
        }
        logit = c.bias + sum(part.values())
        hidden = (users.taste - users.known_taste)[user][row]
        known = logit - part["user"] - c.gain_taste * (hidden * v).sum(-1)
        like = c.like_bias + 0.5 * quality + 0.6 * part["interest"] + 0.8 * self.like(*at)
        p = {"p_click": sigmoid(logit), "p_like": sigmoid(like), "p_known": sigmoid(known)}
        return p | ({f"part_{k}": part[k] for k in PARTS} if self.parts else {})
