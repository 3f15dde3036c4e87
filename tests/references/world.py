"""The click logit of the synthetic world, from the logged past, in float64 and with loops.

Everything is recomputed from a user's clicked impressions by the sums of the recipe; no recursive
state, no tables of combinations.
"""

import numpy as np

HOUR, DAY = 3600, 86400
SCALES = (HOUR, 8 * HOUR, 2 * DAY, 14 * DAY, 90 * DAY)
WEIGHTS = (1.0, 0.8, 0.9, 1.0, 1.1)
GAP_ENDS = (120, 600, 1800, 2 * HOUR, 8 * HOUR, DAY, 3 * DAY, 10 * DAY)


def interest(past, t, v, item):
    """<e, v_i>, e = sum_s w_s num_s / (2 + den_s); past: (time, item, liked) of the positives."""
    e = np.zeros(v.shape[1])
    for scale, w in zip(SCALES, WEIGHTS):
        num, den = np.zeros(v.shape[1]), 0.0
        for tj, j, liked in past:
            c = (2 if liked else 1) * np.exp(-(t - tj) / scale)
            num, den = num + c * v[j].astype(float), den + c
        e += w * num / (2 + den)
    return float(e @ v[item].astype(float))


def fading_count(past, t, values, item, memory):
    """Positives that share the item's value, fading with `memory` seconds."""
    return sum(np.exp(-(t - tj) / memory) for tj, j, _ in past if values[j] == values[item])


def sequence_fields(past, t, feature):
    """{field: value, or [4] values of the last positives}; 0 = none yet."""

    def last(name, k):
        return int(feature[name][past[-1 - k][1]]) + 1 if len(past) > k else 0

    gap = 0
    if past:
        gap = 1 + sum(end < t - past[-1][0] for end in GAP_ENDS)
    return {
        "last": [last("category", k) for k in range(4)],
        "last_format": [last("format", k) for k in range(4)],
        "last_language": [last("language", k) for k in range(4)],
        "last2": last("category", 1),
        "gap": gap,
    }


def cross(fields, amplitude, values):
    """sum_m a_m prod_f phi_{m,f}(x_f) - sum_m a_m prod_f mean(phi_{m,f})."""
    recency = 0.5 ** np.arange(4)
    recency /= np.sqrt((recency**2).sum())
    product, mean = np.ones(len(amplitude)), np.ones(len(amplitude))
    for name, table in fields.items():
        phi, x = table.astype(float), values[name]
        lacks = (phi == 1).all(0)  # terms without this field
        mean *= phi.mean(0)
        if isinstance(x, list):
            blend = phi.mean(0) + sum(r * (phi[k] - phi.mean(0)) for r, k in zip(recency, x))
        else:
            blend = phi[x]
        product *= np.where(lacks, 1, blend)
    return float(amplitude.astype(float) @ (product - mean))


def logits(world, user, rows):
    """Parts of the click logit, and the like logit, of one user's impressions.

    world: dict of plain arrays (v, quality, birth, feature, slope, segment, country, spectrum) and
    crosses (click, sequence, like: (fields, amplitude)). user: {feature: value}. rows: the user's
    impressions in order of time and position: dicts with time, position, item, surface, click and
    like.
    """
    out, past, waiting = [], [], []
    for row in rows:
        t, i = row["time"], row["item"]
        if waiting and waiting[0][0] < t:  # a request's own clicks are not in its past
            past, waiting = past + waiting, []
        feature = world["feature"]
        values = {**user, **{k: int(feature[k][i]) for k in feature if k != "creator"}}
        values |= {"surface": row["surface"], "daypart": t // (3 * HOUR) % 8}
        values |= {"weekday": t // DAY % 7, **sequence_fields(past, t, feature)}
        m = fading_count(past, t, feature["creator"], i, 90 * DAY)
        s = fading_count(past, t, feature["category"], i, 2 * HOUR)
        quality = float(world["quality"][i])
        parts = {
            "interest": 0.4 * interest(past, t, world["v"], i),
            "loyalty": 5 * m / (15 + m),
            "satiation": -0.25 * min(3, s),
            "cross": cross(*world["click"], values),
            "sequence": 0.9 * cross(*world["sequence"], values),
            "item": 0.45 * quality - 0.12 * np.log1p((t - world["birth"][i]) / DAY),
            "position": -0.35 * world["slope"][row["surface"]] * np.log2(1 + row["position"]),
        }
        like = -1.2 + 0.5 * quality + 0.6 * parts["interest"] + 0.8 * cross(*world["like"], values)
        taste = 0.8 * world["segment"][user["segment"]] + 0.4 * world["country"][user["country"]]
        known_taste = 0.7 * (taste * world["spectrum"]) @ world["v"][i].astype(float)
        out.append({**parts, "like": like, "known_taste": known_taste})
        if row["click"]:
            waiting.append((t, i, row["like"]))
    return out
