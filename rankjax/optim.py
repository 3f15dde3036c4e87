"""The optax chain of the dense parameters, and its schedules."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("adam", "adamw", "rmsprop", "adagrad")
SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """What moves the dense parameters, and how fast at which step.

    adam, adamw: b1, b2, eps; adamw alone takes weight_decay (decoupled; see `decays`).
    rmsprop: b2, eps (outside the root), no momentum. adagrad: eps, accumulator from 0.
    """

    optimizer: Literal["adam", "adamw", "rmsprop", "adagrad"] = "adam"
    learning_rate: float = 1e-3  # the schedule's peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of the steps, linear from 1 / warm-up steps to the peak
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "cosine"
    final: float = 0.0  # share of the peak at the end (inverse_sqrt: never below it)
    clip: float | None = 1.0  # largest global norm of the dense gradient; None = no clipping

    def __post_init__(self) -> None:
        for field, fine, expected in (
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}"),
            ("schedule", self.schedule in SCHEDULES, f"one of {SCHEDULES}"),
            ("learning_rate", 0 < self.learning_rate < float("inf"), "> 0"),
            ("b1", 0 <= self.b1 < 1, "in [0, 1)"),
            ("b2", 0 <= self.b2 < 1, "in [0, 1)"),
            ("eps", self.eps > 0, "> 0"),
            ("warmup", 0 <= self.warmup <= 1, "a share in [0, 1]"),
            ("final", 0 <= self.final <= 1, "a share in [0, 1]"),
            ("clip", self.clip is None or self.clip > 0, "> 0 or None"),
            ("weight_decay", self.weight_decay >= 0, ">= 0"),
        ):
            if not fine:
                raise ValueError(
                    f"optim.OptimConfig: {field}={getattr(self, field)!r}, expected {expected}"
                )
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"optim.OptimConfig: weight_decay={self.weight_decay} with "
                f"optimizer={self.optimizer!r}, expected 'adamw' (or weight_decay=0)"
            )


def multiplier(config: OptimConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """step (0, 1, ...; int or int32 []) -> share of the peak rate in [0, 1], float32.

    W = warm-up steps. Step i < W: (i + 1) / W, so that the first step moves. After that, with
    p = (i - W) / (total - W): constant 1; linear 1 - (1 - final) p; cosine
    final + (1 - final)(1 + cos(pi p)) / 2; inverse_sqrt max(final, sqrt(max(W, 1) / (i + 1))).
    p reaches 1 one step after the last; steps beyond stay there.
    """
    if total_steps < 1:
        raise ValueError(f"optim.multiplier: total_steps={total_steps}, expected >= 1")
    W = round(config.warmup * total_steps)
    final = config.final

    def share(step: Any) -> jax.Array:
        i = jnp.asarray(step, jnp.float32)
        p = jnp.clip((i - W) / max(total_steps - W, 1), 0, 1)
        if config.schedule == "constant":
            after = jnp.ones_like(i)
        elif config.schedule == "linear":
            after = 1 - (1 - final) * p
        elif config.schedule == "cosine":
            after = final + (1 - final) * (1 + jnp.cos(jnp.pi * p)) / 2
        else:
            after = jnp.maximum(final, jnp.sqrt(max(W, 1) / jnp.maximum(i + 1, max(W, 1))))
        return jnp.where(i < W, (i + 1) / max(W, 1), after)

    return share


def schedule(config: OptimConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """step -> learning rate, float32: the peak times `multiplier`."""
    share = multiplier(config, total_steps)
    return lambda step: config.learning_rate * share(step)


def decays(params: Any) -> Any:
    """Which leaves weight decay pulls to 0: all but those named bias or scale."""

    def decay(path: tuple, leaf: jax.Array) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decay, params)


def transform(config: OptimConfig) -> optax.GradientTransformation:
    """Clip by global norm -> optimizer -> (weight decay): what the rate then multiplies.

    Without the rate, so that one compiled step serves every rate and budget.
    """
    scale = {
        "adam": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "rmsprop": lambda: optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False),
        "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.0, eps=config.eps),
    }[config.optimizer]()
    steps = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    steps.append(scale)
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decays))
    return optax.chain(*steps)


def make(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """`transform`, then minus the scheduled rate: a complete optax optimizer."""
    rate = optax.scale_by_learning_rate(schedule(config, total_steps))
    return optax.chain(transform(config), rate)
