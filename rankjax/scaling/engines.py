"""Where the trials of a study are trained: here, on a Ray cluster, or in SLURM jobs."""

import dataclasses
import pathlib
from typing import Literal

from rankjax.scaling import ray_engine, slurm_engine, study, workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The choice, and what each engine has to know; a setting of one that is not chosen is refused.

    Raises ValueError there.
    """

    # local: in worker processes here; ray: as tasks of a Ray cluster; slurm: in jobs.
    engine: Literal["local", "ray", "slurm"] = "local"
    # Of a Ray cluster's head, host:port; default: RAY_ADDRESS, or the cluster of this machine.
    address: str | None = None
    # What a trial takes of a Ray cluster.
    resources: ray_engine.Resources = ray_engine.Resources()
    # What a SLURM job takes.
    slurm: slurm_engine.Slurm = slurm_engine.Slurm()

    def __post_init__(self) -> None:
        said = {
            "--address": ("ray", self.address is not None),
            "--resources": ("ray", self.resources != ray_engine.Resources()),
            "--slurm": ("slurm", self.slurm != slurm_engine.Slurm()),
        }
        for flag, (engine, given) in said.items():
            if given and engine != self.engine:
                raise ValueError(
                    f"study: found {flag} with --engine {self.engine}, expected {engine}"
                )


def check(where: Engine, workers_at_once: int | None = None) -> None:
    """Raises ValueError where the engine is not there, or takes no such number; for before anything
    is prepared for it."""
    _check_workers(where, workers_at_once)
    if where.engine == "ray":
        ray_engine.check(where.resources, where.address)
    elif where.engine == "slurm":
        slurm_engine.check()


def _check_workers(where: Engine, count: int | None) -> None:
    if where.engine == "slurm" and count is not None:
        raise ValueError(
            f"study: found --workers {count} with --engine slurm, expected --slurm.jobs and "
            "--slurm.cpus"
        )


def run(
    asked: study.Study, folder: pathlib.Path, where: Engine, workers_at_once: int | None = None
) -> pathlib.Path:
    """Trains what the folder lacks and returns the path of its report.html.

    workers_at_once: trials trained at a time; None = what the machine or the cluster has room for.

    Raises ValueError, before any work, where an engine is not there, and as
    `workers.run` does.
    """
    _check_workers(where, workers_at_once)
    if where.engine == "ray":
        return ray_engine.run(
            asked, folder, where.resources, address=where.address, at_once=workers_at_once
        )
    if where.engine == "slurm":
        return slurm_engine.run(asked, folder, where.slurm)
    return workers.run(asked, folder, workers=workers_at_once)
