"""Scaling laws from measured points: power laws, their intervals, and when there is none to see.

L(x) = E + A x^-alpha, and L(N, D) = E + A N^-alpha + B D^-beta. Both minimise the SUM of Huber
terms on log residuals over many quasi-Newton starts, in the logsumexp form, as Hoffmann et al.
(2022, "Training Compute-Optimal Large Language Models", appendix D.2) and Besiroglu et al. (2024,
"Chinchilla Scaling: A replication attempt") do. A mean in place of the sum makes the objective so
small that a descent stops early; here it is moreover measured in units of delta^2, so that the
stopping rule does not depend on delta. What the data cannot carry is refused in words.
"""

import dataclasses
import itertools

import numpy as np
from scipy import special

from rankjax.scaling import descent, support

LEVEL = 0.95  # of every interval and band
FINALISTS = 4  # starts that are descended to the end
CHUNK = 256  # refits at once

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """L(x) = E + A x^-alpha.

    E (unit of the loss), A, alpha: the best optimum; nan where nothing could be fitted.
    intervals: 95% bootstrap percentiles of "E", "A", "alpha" (sizes resampled, seeds within them);
      empty where the law was refused before.
    residuals [n]: log(loss) - log(L(x)), in the order given.
    ok: the data support the law; if not, `reasons` says why, in words.
    warnings: outliers and points on which the exponent hangs.
    draws [m, 3]: (E, log A, alpha) of every resample; x_range: smallest and largest x.
    """

    E: float
    A: float
    alpha: float
    intervals: dict[str, Interval]
    residuals: np.ndarray
    ok: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    draws: np.ndarray
    x_range: Interval

    def predict(self, x) -> np.ndarray:
        """The fitted loss at x [m] -> [m], float64."""
        x = np.asarray(x, np.float64)
        return self.E + self.A * x**-self.alpha

    def band(self, x) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper 95% bootstrap limits of the fitted loss at x [m] -> ([m], [m])."""
        log_x = np.log(np.asarray(x, np.float64))
        E, log_a, alpha = (self.draws[:, i, None] for i in range(3))
        return _quantiles(E + np.exp(log_a - alpha * log_x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """L(N, D) = E + A N^-alpha + B D^-beta; fields as in `Fit`, intervals of all five."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    intervals: dict[str, Interval]
    residuals: np.ndarray
    ok: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    def predict(self, params, samples) -> np.ndarray:
        """The fitted loss at params [m] and samples [m] -> [m], float64."""
        params, samples = np.asarray(params, np.float64), np.asarray(samples, np.float64)
        return self.E + self.A * params**-self.alpha + self.B * samples**-self.beta


def power_law(
    x, loss, *, seed_groups=None, starts=None, delta: float = 1e-3, bootstrap: int = 200, seed=0
) -> Fit:
    """Fits L(x) = E + A x^-alpha to x [n] > 0 and loss [n] > 0; see `Fit` for what comes back.

    Args:
      seed_groups: [n] labels; rows with one label are seeds of one size. None: equal x, one size.
      starts: [m, 3] starts (E as a share of the smallest loss, A x^-alpha at the mean of log x as
        a share of what E leaves of the median loss, alpha); None: a grid of 48.
      delta: where the Huber loss on log residuals turns from square to absolute.
      bootstrap: resamples; seed: of the resampling.
    Raises:
      ValueError: shapes differ, or an entry is not a finite number above 0.
    """
    (x,), loss = _checked({"x": x}, loss)
    groups = _groups(x if seed_groups is None else seed_groups, len(loss))
    distinct = len(np.unique(x))
    if distinct < support.MIN_SIZES:
        nan = float("nan")
        span = (float(x.min()), float(x.max())) if len(x) else (nan, nan)
        why = (
            f"only {distinct} distinct sizes; a law with a floor needs at least {support.MIN_SIZES}"
        )
        return Fit(
            **dict(E=nan, A=nan, alpha=nan, intervals={}, residuals=np.full(len(x), nan)),
            **dict(ok=False, reasons=(why,), warnings=(), draws=np.zeros((0, 3)), x_range=span),
        )
    problem = _Problem.of([x], loss, delta)
    grid = starts if starts is not None else _grid((0.2, 0.5, 0.8, 0.95), (0.5, 1.0), 1)
    best = problem.solve(problem.starts(grid))
    E, log_a, alpha = problem.unpack(best)
    residuals = -problem.residuals(best)
    reasons = support.range_reasons({"x": x}) + support.trend_reasons(x, loss, groups, residuals)
    reasons += support.floor_reasons(E, loss)
    # A law that is refused already needs no interval, and its flat optimum would cost the most.
    draws = problem.bootstrap(best, groups, 0 if reasons else bootstrap, seed, distinct=3)
    intervals = _intervals(draws, ("E", "A", "alpha"))
    reasons += support.exponent_reasons({"alpha": alpha}, intervals)
    return Fit(
        **dict(E=float(E), A=float(np.exp(log_a)), alpha=float(alpha), intervals=intervals),
        **dict(residuals=residuals, ok=not reasons, reasons=reasons, draws=draws),
        warnings=support.outlier_warnings(problem, best, groups, {"alpha": 2}, each=not reasons),
        x_range=(float(x.min()), float(x.max())),
    )


def joint(
    params, samples, loss, *, seed_groups=None, starts=None, delta=1e-3, bootstrap=200, seed=0
) -> Joint:
    """Fits L = E + A params^-alpha + B samples^-beta; arguments and errors as `power_law`.

    starts: [m, 5] (share of E; share and exponent of the params' term; the same of the samples').
    """
    inputs, loss = _checked({"params": params, "samples": samples}, loss)
    label = inputs[0] + 1j * inputs[1]  # a size is a pair (params, samples)
    groups = _groups(label if seed_groups is None else seed_groups, len(loss))
    few = tuple(
        f"only {len(np.unique(v))} distinct values of {name}; "
        f"at least {support.MIN_SIZES - 1} are needed"
        for name, v in zip(("params", "samples"), inputs)
        if len(np.unique(v)) < support.MIN_SIZES - 1
    )
    if len(np.unique(label)) < 6:
        few += (f"only {len(np.unique(label))} distinct points for five parameters",)
    if few:
        nan = float("nan")
        return Joint(
            **dict(E=nan, A=nan, alpha=nan, B=nan, beta=nan, intervals={}, warnings=()),
            **dict(residuals=np.full(len(loss), nan), ok=False, reasons=few),
        )
    problem = _Problem.of(inputs, loss, delta)
    grid = starts if starts is not None else _grid((0.3, 0.6, 0.9), (0.5,), 2)
    best = problem.solve(problem.starts(grid))
    E, log_a, alpha, log_b, beta = problem.unpack(best)
    reasons = support.range_reasons({"params": inputs[0], "samples": inputs[1]})
    reasons += support.floor_reasons(E, loss)
    draws = problem.bootstrap(best, groups, 0 if reasons else bootstrap, seed, distinct=6)
    intervals = _intervals(draws, ("E", "A", "alpha", "B", "beta"))
    reasons += support.exponent_reasons({"alpha": alpha, "beta": beta}, intervals)
    return Joint(
        **dict(E=float(E), A=float(np.exp(log_a)), alpha=float(alpha)),
        **dict(B=float(np.exp(log_b)), beta=float(beta), intervals=intervals),
        **dict(residuals=-problem.residuals(best), ok=not reasons, reasons=reasons),
        warnings=support.outlier_warnings(
            problem, best, groups, {"alpha": 2, "beta": 4}, each=not reasons
        ),
    )


def frontier(training_flops, metric, *, lower_is_better: bool = True) -> np.ndarray:
    """Indices of the points that no cheaper or equal point beats, by training_flops [n].

    The lower-left envelope of (training_flops, metric), or the upper-left one. int64 [m], m <= n.
    """
    flops = np.asarray(training_flops, np.float64)
    value = np.asarray(metric, np.float64) * (1 if lower_is_better else -1)
    keep, best = [], np.inf
    for i in np.lexsort((value, flops)):
        if value[i] < best:
            best = value[i]
            keep.append(i)
    return np.asarray(keep, np.int64)


def interpolate_rate(sizes, rate_small: float, rate_large: float, at):
    """The learning rate at size(s) `at`, on the straight line in log-log between two swept sizes.

    Args: sizes: (smallest, largest), e.g. dense params, > 0; at: a number or [m], > 0.
    Returns: float64, shape of `at`. Outside [smallest, largest] the nearer end's rate is held
      (nothing is extrapolated); where both sizes are equal, the geometric mean of the two rates.
    Raises: ValueError: a size or rate is not above 0.
    """
    small, large = (float(s) for s in sizes)
    at = np.asarray(at, np.float64)
    if min(small, large, rate_small, rate_large) <= 0 or np.any(at <= 0):
        raise ValueError(
            f"interpolate_rate: sizes {small:g}, {large:g}, rates {rate_small:g}, {rate_large:g} "
            "and `at` must all be above 0"
        )
    if small == large:
        share = np.full_like(at, 0.5)
    else:
        share = np.clip(np.log(at / small) / np.log(large / small), 0.0, 1.0)
    return rate_small ** (1 - share) * rate_large**share


@dataclasses.dataclass(frozen=True)
class _Problem:
    """min over theta = (e, a_1, phi_1, ...): sum_i Huber(logsumexp(e, a_j - alpha_j u_ij) - l_i).

    u [n, J]: log inputs less their means, which makes a_j and alpha_j nearly uncorrelated;
    alpha_j = MAX_EXPONENT sigmoid(phi_j).
    """

    u: np.ndarray
    means: np.ndarray
    log_loss: np.ndarray
    delta: float

    @classmethod
    def of(cls, inputs, loss, delta):
        logs = np.log(np.stack(inputs, axis=1))
        return cls(logs - logs.mean(0), logs.mean(0), np.log(loss), delta)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """log prediction - log loss, [n]."""
        return special.logsumexp(self._terms(theta[None])[0], axis=1) - self.log_loss

    def objective(self, theta: np.ndarray, weights=None) -> tuple[np.ndarray, np.ndarray]:
        """Sums of Huber terms in units of delta^2, and their gradients.

        theta [k, p]; weights [k, n], how often each point counts, None = once. -> ([k], [k, p]).
        """
        terms = self._terms(theta)
        top = terms.max(-1)
        shares = np.exp(terms - top[..., None])
        total = shares.sum(-1)
        z = (top + np.log(total) - self.log_loss) / self.delta
        inside = np.clip(z, -1, 1)
        huber, slope = inside * (z - 0.5 * inside), inside / self.delta / total
        if weights is not None:
            huber, slope = huber * weights, slope * weights
        shares *= slope[..., None]
        gradient = np.empty_like(theta)
        gradient[:, 0] = shares[..., 0].sum(1)
        gradient[:, 1::2] = shares[..., 1:].sum(1)
        alpha = _exponent(theta[:, 2::2])
        by_alpha = -(shares[..., 1:] * self.u).sum(1)
        gradient[:, 2::2] = by_alpha * alpha * (1 - alpha / support.MAX_EXPONENT)
        return huber.sum(1), gradient

    def starts(self, grid) -> np.ndarray:
        """Rows of shares and exponents (see `power_law`) -> rows of theta."""
        grid = np.asarray(grid, np.float64)
        floor = grid[:, 0] * np.exp(self.log_loss.min())
        left = np.exp(np.median(self.log_loss)) - floor
        theta = grid.copy()
        theta[:, 0] = np.log(floor)
        theta[:, 1::2] = np.log(grid[:, 1::2] * left[:, None])
        theta[:, 2::2] = special.logit(grid[:, 2::2] / support.MAX_EXPONENT)
        return theta

    def solve(self, starts) -> np.ndarray:
        """The best optimum over starts [m, p]: all a little way, the best few to the end."""
        theta, value = descent.minimise(lambda t, _: self.objective(t), starts, steps=40, gain=1e-6)
        theta = theta[np.argsort(value)[:FINALISTS]]
        theta, value = descent.minimise(lambda t, _: self.objective(t), theta, steps=500)
        return theta[np.argmin(value)]

    def refit(self, best: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The optima [m, p] nearest to `best` under weights [m, n] of the points."""
        out = [np.zeros((0, len(best)))]
        for some in np.split(weights, range(CHUNK, len(weights), CHUNK)):  # bounded memory
            start = np.repeat(best[None], len(some), axis=0)
            objective = lambda theta, which, some=some: self.objective(theta, some[which])
            out.append(descent.minimise(objective, start, steps=150, gain=1e-8)[0])
        return np.concatenate(out)

    def unpack(self, theta: np.ndarray) -> np.ndarray:
        """theta [..., p] -> (E, log A, alpha, log B, beta, ...) at x = 1 again, [..., p]."""
        out = np.array(theta, np.float64)
        out[..., 0] = np.exp(theta[..., 0])
        out[..., 2::2] = _exponent(theta[..., 2::2])
        out[..., 1::2] = theta[..., 1::2] + out[..., 2::2] * self.means
        return out

    def bootstrap(self, best, groups, count, seed, *, distinct) -> np.ndarray:
        """[count, p] unpacked optima: sizes drawn with replacement, then seeds within each."""
        rng = np.random.default_rng(seed)
        weights = np.zeros((count, len(self.log_loss)))
        for row in weights:
            for _ in range(100):  # a draw of too few sizes has no unique optimum: draw again
                sizes = rng.integers(len(groups), size=len(groups))
                if len(np.unique(sizes)) >= min(distinct, len(groups)):
                    break
            for size in sizes:
                np.add.at(row, rng.choice(groups[size], len(groups[size])), 1)
        return self.unpack(self.refit(best, weights))

    def _terms(self, theta):
        """[k, n, 1 + J] logarithms of the floor and of the terms."""
        power = theta[:, None, 1::2] - _exponent(theta[:, None, 2::2]) * self.u
        floor = np.broadcast_to(theta[:, None, :1], (*power.shape[:2], 1))
        return np.concatenate([floor, power], axis=-1)


def _exponent(phi: np.ndarray) -> np.ndarray:
    """Unbounded -> 0 to MAX_EXPONENT, so that the search needs no bounds."""
    return support.MAX_EXPONENT * special.expit(phi)


def _checked(inputs: dict, loss) -> tuple[list[np.ndarray], np.ndarray]:
    loss = np.asarray(loss, np.float64)
    arrays = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    for name, value in {**arrays, "loss": loss}.items():
        if value.ndim != 1 or value.shape != loss.shape:
            raise ValueError(f"{name} has shape {value.shape}, expected [n] = {loss.shape}")
        bad = np.flatnonzero(~(np.isfinite(value) & (value > 0)))
        if len(bad):
            raise ValueError(
                f"{name}: row {bad[0]} holds {value[bad[0]]}, expected a finite number above 0"
            )
    return list(arrays.values()), loss


def _groups(labels, rows: int) -> list[np.ndarray]:
    """[n] labels -> the rows of each label."""
    labels = np.asarray(labels)
    if labels.shape != (rows,):
        raise ValueError(f"seed_groups has shape {labels.shape}, expected [n] = ({rows},)")
    _, inverse = np.unique(labels, return_inverse=True)
    return [np.flatnonzero(inverse == g) for g in range(inverse.max(initial=-1) + 1)]


def _grid(floors, shares, terms: int) -> list:
    exponents = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2) if terms == 1 else (0.1, 0.3, 0.6, 1.0)
    return [
        [floor, *itertools.chain(*((share, exponent) for exponent in some))]
        for floor, share in itertools.product(floors, shares)
        for some in itertools.product(exponents, repeat=terms)
    ]


def _quantiles(draws: np.ndarray) -> tuple:
    tail = 100 * (1 - LEVEL) / 2
    return tuple(np.percentile(draws, (tail, 100 - tail), axis=0)) if len(draws) else (None, None)


def _intervals(draws: np.ndarray, names) -> dict[str, Interval]:
    if not len(draws):
        return {}
    low, high = _quantiles(draws)
    logs = ("A", "B")
    return {
        name: tuple(float(np.exp(v) if name in logs else v) for v in (low[i], high[i]))
        for i, name in enumerate(names)
    }
