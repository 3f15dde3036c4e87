"""What is fixed in the synthetic world: its configuration, its items and its crosses.

Everything here is drawn once per seed and, with infinite data per id, learnable. Ids are 0-based;
the log adds 1 (0 = missing). Distributions and constants: see `World` and the functions' docs.
"""

import dataclasses
import functools

import numpy as np

HOUR, DAY = 3600, 86400
USER = {"segment": 12, "age": 6, "country": 8, "device": 4}
CONTEXT = {"surface": 5, "daypart": 8, "weekday": 7}  # daypart = hour // 3
ITEM = {"category": 24, "format": 6, "price": 8, "language": 6}
# What the user did before: 0 = none yet. The "last*" fields are blended over the last positives.
SEQUENCE = {"last": 25, "last2": 25, "last_format": 7, "last_language": 7, "gap": 10}
BLENDED = {"last": "category", "last_format": "format", "last_language": "language"}
BLEND = 4  # positives that a blended field sees
# Seconds since the last positive that end the gap buckets 1 .. 9.
GAPS = np.array([120, 600, 1800, 2 * HOUR, 8 * HOUR, DAY, 3 * DAY, 10 * DAY])
MOST_DAYS = 20_000  # seconds are spooled as int32
MOST_CREATORS = 1000  # the loyalty state is dense: [users of a block, creators]


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The synthetic world. Gains are in logit units; every field is part of the definition.

    Given everything that happened before a request, the labels of its candidates are independent
    Bernoulli draws from a known probability: the labels are the only noise.
    """

    seed: int = 0
    users: int = 1000
    requests: float = 30.0  # mean requests of a user that lives the whole horizon
    days: int = 120
    slots: int = 1500  # items alive at any time
    creators: int = 300
    held_out: float = 0.1  # last share of the horizon that is the test span
    block: int = 512  # users that advance together and share a generator
    dim: int = 24  # of item factors and tastes
    spectrum: float = 0.8  # amplitude of factor k is k^-spectrum
    scales: tuple[float, ...] = (HOUR, 8 * HOUR, 2 * DAY, 14 * DAY, 90 * DAY)  # of interest, s
    scale_weights: tuple[float, ...] = (1.0, 0.8, 0.9, 1.0, 1.1)
    shrink: float = 2.0  # pseudo-count of the exponential averages
    loyalty_days: float = 90.0  # memory of the count of past positives per creator
    loyalty_half: float = 15.0  # count at which loyalty reaches half its gain
    terms: int = 192  # static crosses: user, context and item fields
    sequence_terms: int = 64  # crosses with what the user did last
    term_offset: float = 2.0  # amplitude of term m = 1, 2, .. is (m + offset)^-decay
    term_decay: float = 1.0
    sequence_decay: float = 1.2
    recency: float = 0.5  # weight of the k-th last positive in blended fields is recency^k
    term_mean: float = 0.8  # mean of a factor: gives a product lower-order marginals to climb on
    bias: float = -1.1
    gain_interest: float = 0.4
    gain_taste: float = 0.7
    gain_cross: float = 1.0
    gain_sequence: float = 0.9
    gain_item: float = 0.45
    gain_user: float = 0.3
    gain_fresh: float = 0.12
    gain_position: float = 0.35
    gain_loyalty: float = 5.0
    gain_satiation: float = 0.25
    like_bias: float = -1.2
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # popular, personalised, uniform candidates

    def __post_init__(self) -> None:
        least = {"users": 1, "days": 1, "slots": 24, "creators": 24, "block": 1, "dim": 1}
        least |= {"seed": 0, "terms": 4, "sequence_terms": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"World: {name}={value!r}, expected an integer >= {low}")
        if self.days > MOST_DAYS:
            raise ValueError(f"World: days={self.days}, expected at most {MOST_DAYS}")
        if self.creators > MOST_CREATORS:
            raise ValueError(f"World: creators={self.creators}, expected at most {MOST_CREATORS}")
        if not self.requests > 0:
            raise ValueError(f"World: requests={self.requests}, expected > 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"World: held_out={self.held_out}, expected between 0 and 1")
        if len(self.scales) != len(self.scale_weights) or not self.scales:
            raise ValueError(
                f"World: {len(self.scale_weights)} scale_weights, expected {len(self.scales)}, "
                "one per scale"
            )
        if len(self.mix) != 3 or min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-9:
            raise ValueError(f"World: mix={self.mix}, expected three shares that sum to 1")

    @property
    def horizon(self) -> int:
        """Seconds from the first possible request to the end."""
        return self.days * DAY

    @property
    def blocks(self) -> int:
        return -(-self.users // self.block)

    @property
    def creators_per_category(self) -> int:
        return self.creators // ITEM["category"]


def generator(seed: int, stream: int, block: int = 0) -> np.random.Generator:
    """The random stream of the tables (stream 0) or of a block of users (stream 1)."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 40) + block]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
    """Sum over M terms: amplitude times a product of 2 to 4 scalar functions of distinct fields.

    fields: {field: [cardinality, M]} float32, ones where a term lacks the field.
    amplitude: [M] float32. mean: of the sum, over uniform independent values.
    item: [6912, M], the product over the item fields, row `Tables.combination`: one look-up in
      place of four.
    """

    fields: dict[str, np.ndarray]
    amplitude: np.ndarray
    mean: np.float32
    item: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """World parameters of I items on n shelves (slots), sorted by category.

    A shelf holds a succession of items; occupant at t = first + floor((t + phase) / life), so that
    births and deaths cost O(1).
    """

    life: np.ndarray  # [n] s
    phase: np.ndarray  # [n] s
    first: np.ndarray  # [n] item
    birth: np.ndarray  # [I] s, before 0 for the first occupants
    category_start: np.ndarray  # [25] first shelf of each category
    popularity: np.ndarray  # [n + 1] cumulative over shelves
    log_popularity: np.ndarray  # [I] of the shelf, relative to the mean
    feature: dict[str, np.ndarray]  # [I] category, format, price, language, creator
    combination: np.ndarray  # [I] row of Cross.item
    factors: np.ndarray  # [I, dim]
    quality: np.ndarray  # [I]
    segment: np.ndarray  # [12, dim] taste
    country: np.ndarray  # [8, dim] taste
    spectrum: np.ndarray  # [dim]
    position_slope: np.ndarray  # [5] by surface
    click: Cross
    sequence: Cross
    like: Cross

    @property
    def items(self) -> int:
        return len(self.birth)

    def occupant(self, slot: np.ndarray, time: np.ndarray) -> np.ndarray:
        age = (time + self.phase[slot]) / self.life[slot]
        return self.first[slot] + np.floor(age).astype(np.int64)


@functools.lru_cache(maxsize=1)
def tables(config: World) -> Tables:
    """Draws the tables; kept, so that a process builds them once for all its blocks."""
    c, g, n = config, generator(config.seed, 0), config.slots
    spectrum = np.arange(1, c.dim + 1.0) ** -c.spectrum
    spectrum /= np.sqrt((spectrum**2).sum())  # a factor's expected squared norm is 1
    life = np.exp(g.uniform(np.log(20), np.log(1500), n)) * DAY
    phase = g.uniform(0, 1, n) * life
    count = np.floor((c.horizon + phase) / life).astype(np.int64) + 1
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    slot = np.repeat(np.arange(n), count)
    I = len(slot)
    birth = (np.arange(I) - first[slot]) * life[slot] - phase[slot]
    category_of = np.sort(g.choice(ITEM["category"], n, p=_zipf(ITEM["category"], 0.7, g)))
    popularity = g.permutation((3.0 + np.arange(n)) ** -0.8)
    feature = {k: g.choice(v, I, p=_zipf(v, 0.5, g)).astype(np.int16) for k, v in ITEM.items()}
    # Category and popularity belong to the shelf, all else to the item. The draw for category
    # above is thrown away; it belongs to the random stream.
    feature["category"] = category_of[slot].astype(np.int16)
    per = c.creators_per_category
    creator = np.minimum((per * g.random(I) ** 1.7).astype(np.int64), per - 1)
    feature["creator"] = (feature["category"] * per + creator).astype(np.int32)
    of_category = g.normal(size=(ITEM["category"], c.dim))
    of_creator = g.normal(size=(per * ITEM["category"], c.dim))
    factors = np.sqrt(0.55) * of_category[feature["category"]]
    factors += np.sqrt(0.3) * of_creator[feature["creator"]]
    factors += np.sqrt(0.15) * g.normal(size=(I, c.dim))
    quality = 0.8 * g.normal(size=per * ITEM["category"])[feature["creator"]]
    quality += 0.6 * g.normal(size=I)
    return Tables(
        life=life,
        phase=phase,
        first=first,
        birth=birth,
        category_start=np.searchsorted(category_of, np.arange(ITEM["category"] + 1)),
        popularity=np.concatenate([[0.0], np.cumsum(popularity)]),
        log_popularity=np.log(popularity / popularity.mean()).astype(np.float32)[slot],
        feature=feature,
        combination=np.ravel_multi_index([feature[k] for k in ITEM], tuple(ITEM.values())),
        factors=(factors * spectrum).astype(np.float32),
        quality=quality.astype(np.float32),
        # Keyword arguments are evaluated in this order, which is the order of the draws.
        segment=g.normal(size=(USER["segment"], c.dim)),
        country=g.normal(size=(USER["country"], c.dim)),
        spectrum=spectrum,
        position_slope=(0.6 + 0.8 * g.random(CONTEXT["surface"])).astype(np.float32),
        click=_cross(c, g, c.terms, c.term_decay, sequence=False),
        sequence=_cross(c, g, c.sequence_terms, c.sequence_decay, sequence=True),
        like=_cross(c, g, c.terms // 4, c.term_decay, sequence=False),
    )


def _zipf(n: int, exponent: float, g: np.random.Generator) -> np.ndarray:
    weight = (1.0 + np.arange(n)) ** -exponent
    return g.permutation(weight / weight.sum())


def _term_fields(g: np.random.Generator, sequence: bool) -> list[str]:
    """The fields of one term: an item field, a sequence field where asked for, then any others."""
    order = g.choice([2, 3, 4], p=[0.8, 0.2, 0] if sequence else [0.45, 0.4, 0.15])
    share = [0.75, 0.1, 0.05, 0.1] if sequence else [0.4, 0.2, 0.2, 0.2]
    fields = [str(g.choice(list(ITEM), p=share))]
    if sequence:
        fields.append(str(g.choice(list(SEQUENCE), p=[0.7, 0.1, 0.05, 0.05, 0.1])))
    every = [*USER, *CONTEXT, *ITEM, *(SEQUENCE if sequence else ())]
    rest = [k for k in every if k not in fields]
    return fields + [str(k) for k in g.choice(rest, max(0, order - len(fields)), replace=False)]


def _cross(c: World, g: np.random.Generator, terms: int, decay: float, *, sequence: bool) -> Cross:
    """Draws M terms; amplitudes (m + offset)^-decay, normalised to a sum of squares of 1."""
    cardinality = {**USER, **CONTEXT, **ITEM, **SEQUENCE}
    table = {k: np.ones((n, terms), np.float32) for k, n in cardinality.items()}
    mean = np.zeros(terms)
    for m in range(terms):
        fields = _term_fields(g, sequence)
        mean[m] = (c.term_mean**2 / (1 + c.term_mean**2)) ** (len(fields) / 2)
        for k in fields:
            x = g.normal(size=cardinality[k])
            # Exact mean and variance over the values: base rates do not drift between worlds.
            x = (x - x.mean()) / x.std()
            table[k][:, m] = (c.term_mean + x) / np.sqrt(1 + c.term_mean**2)
    amplitude = (np.arange(1, terms + 1.0) + c.term_offset) ** -decay
    amplitude /= np.sqrt((amplitude**2).sum())
    item = np.ones((1, terms), np.float32)
    for k in ITEM:  # rows in the order of np.ravel_multi_index
        item = (item[:, None] * table[k]).reshape(-1, terms)
    return Cross(
        fields=table,
        amplitude=amplitude.astype(np.float32),
        mean=np.float32(amplitude @ mean),
        item=item,
    )
