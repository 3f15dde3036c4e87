"""When measured points cannot carry a scaling law, and which of them carry too much: in words.

Every function returns sentences, none where all is well; the thresholds are the constants here.
`problem` is fit.py's: residuals(theta) [n], refit(best, weights [m, n]) -> [m, p], unpack.
"""

import numpy as np
from scipy import stats

MIN_SIZES = 4  # distinct x: a curve of three parameters needs one more to be tested at all
MIN_RANGE = 4.0  # largest x / smallest x
MIN_EXPONENT = 0.01  # below, x^-alpha cannot be told from a constant
MAX_SPAN = 2.0  # width of the exponent's interval / exponent
MIN_FLOOR = 0.01  # E below this share of the smallest loss counts as 0
MOVES = 0.10  # relative change of an exponent, without one point, that is worth a warning
SIGMAS = 5.0  # robust standard deviations of a residual that make an outlier
MAX_EXPONENT = 5.0  # bound of the search


def range_reasons(inputs: dict[str, np.ndarray]) -> tuple[str, ...]:
    return tuple(
        f"{name} covers a factor of {v.max() / v.min():.2g} only; at least {MIN_RANGE:g} is needed"
        for name, v in inputs.items()
        if v.max() < MIN_RANGE * v.min()
    )


def trend_reasons(x, loss, groups, residuals) -> tuple[str, ...]:
    """Where the mean of a size lies above that of the next smaller one by more than chance.

    Chance is the spread over seeds, or, with one seed a size, the spread around the curve.
    """
    groups = sorted(groups, key=lambda rows: x[rows].mean())
    means = np.array([np.log(loss[rows]).mean() for rows in groups])
    counts = np.array([len(rows) for rows in groups])
    freedom = int((counts - 1).sum())
    if freedom:
        within = sum(((np.log(loss[rows]) - m) ** 2).sum() for rows, m in zip(groups, means))
        noise, source = np.sqrt(within / freedom), "the spread over seeds"
    else:
        freedom = max(len(groups) - 3, 1)
        noise, source = np.sqrt((residuals**2).sum() / freedom), "the spread around the curve"
    limit = stats.t.isf(0.01 / (len(groups) - 1), freedom) * noise
    rise = np.diff(means) / np.sqrt(1 / counts[1:] + 1 / counts[:-1])
    out = []
    if means[-1] >= means[0]:
        out.append("the loss at the largest x is not below the loss at the smallest")
    for i in np.flatnonzero(rise > limit):
        here, there = x[groups[i]].mean(), x[groups[i + 1]].mean()
        out.append(f"the loss rises from x = {here:.3g} to {there:.3g} by more than {source}")
    return tuple(out)


def floor_reasons(E: float, loss: np.ndarray) -> tuple[str, ...]:
    """Where the floor E has run to its bound."""
    if E / loss.min() >= MIN_FLOOR:
        return ()
    return ("the floor E is at its bound 0: the points do not show where the loss ends",)


def exponent_reasons(exponents: dict[str, float], intervals: dict) -> tuple[str, ...]:
    """Exponents at the search's bound, or whose interval says next to nothing."""
    out = []
    for name, value in exponents.items():
        if value > 0.99 * MAX_EXPONENT:
            out.append(f"{name} is at the bound {MAX_EXPONENT:g} of the search")
        if name not in intervals:
            continue
        low, high = intervals[name]
        if low <= MIN_EXPONENT:
            out.append(
                f"the interval of {name}, {low:.3g} to {high:.3g}, reaches 0: a straight line in "
                "the logarithm describes these points as well"
            )
        elif high - low > MAX_SPAN * value:
            out.append(
                f"the interval of {name}, {low:.3g} to {high:.3g}, is wider than "
                f"{MAX_SPAN:g} times {name} = {value:.3g} itself"
            )
    return tuple(out)


def outlier_warnings(
    problem, best, groups, exponents: dict[str, int], *, each: bool = True
) -> tuple[str, ...]:
    """Names the points that lie far off and, with `each`, those without which an exponent moves."""
    rows = np.arange(len(problem.log_loss))
    if len(groups) < MIN_SIZES + 1 or len(rows) < len(best) + 2:
        return ()  # every point of so few carries the curve
    out = []
    residuals = problem.residuals(best)
    sigma = 1.4826 * np.median(np.abs(residuals))
    far = np.flatnonzero(np.abs(residuals) > max(SIGMAS * sigma, 1e-6))
    if len(far) and len(far) <= len(rows) // 3 and len(rows) >= len(best) + 5:
        kept = np.ones((1, len(rows)))
        kept[0, far] = 0
        again = problem.unpack(problem.refit(best, kept))[0]
        out.append(
            f"outliers: {_name(problem, far)} more than {SIGMAS:g} robust standard deviations off"
            f"; without them {_moves(problem.unpack(best), again, exponents)}"
        )
    if each:
        refits = problem.unpack(problem.refit(best, 1.0 - np.eye(len(rows))))
        for row, again in zip(rows, refits):
            if moves := _moves(problem.unpack(best), again, exponents, MOVES):
                out.append(f"the fit hangs on {_name(problem, [row])}: without it {moves}")
    return tuple(out)


def _moves(before, after, exponents: dict[str, int], least: float = 0.0) -> str:
    """ "alpha goes from .1 to .2 (100%)", for the exponents that move by more than `least`."""
    return " and ".join(
        f"{name} goes from {before[i]:.3g} to {after[i]:.3g} ({abs(after[i] / before[i] - 1):.0%})"
        for name, i in exponents.items()
        if before[i] > 0 and abs(after[i] / before[i] - 1) > least
    )


def _name(problem, rows, most: int = 8) -> str:
    """Points by row, input and loss: how a reader finds them again."""
    inputs, loss = np.exp(problem.u + problem.means), np.exp(problem.log_loss)
    named = [
        f"row {r} ({', '.join(f'{v:.3g}' for v in inputs[r])}; loss {loss[r]:.4g})"
        for r in list(rows)[:most]
    ]
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(named) + more
