"""Trains a study in SLURM jobs: each runs the loop of local workers on the folder that all share.

A job starts one worker a core, or one a GPU; workers of all jobs claim trials by locks on their
folders. Told to end by SLURM (the time limit, a preemption), a job saves its trials, is queued
again and goes on; killed, it costs the steps since the last checkpoints, and the others take its
trials over.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import signal
import time
from typing import Any

import jax

from rankjax.scaling import cores, nodes, study, workers

POLL = 5.0  # seconds between two looks at the folder and the jobs
SAVE = 60  # seconds that workers have to save when SLURM ends their job
END = 600  # seconds that a job told to end waits for what SLURM does to it
LOG_LEVEL = "SUBMITIT_LOG_LEVEL"
REQUEUES = 10_000  # a study may take longer than any job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """The jobs: how many, and what each takes."""

    # How many are submitted; a study ends sooner with more, up to one a trial.
    jobs: int = 1
    # A job's workers, one a core; with GPUs, cores that the workers share.
    cpus: int = 1
    # A job's workers, one a GPU.
    gpus: int = 0
    # Time limit of a job; it is queued again until the study is complete.
    minutes: int = 240
    # GB of a job; by default what the cluster gives.
    memory: float | None = None
    # Of the cluster; by default its own.
    partition: str | None = None
    # That pays.
    account: str | None = None
    # Further options of sbatch, e.g. qos high constraint a100.
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    # Shell lines of a job before it starts, e.g. "module load cuda".
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.jobs < 1 or self.cpus < 1 or self.gpus < 0 or self.minutes < 5:
            raise ValueError(
                f"study: found {self}, expected jobs and cpus of 1 or more, gpus of 0 or more, and "
                "5 minutes or more (a job saves 90 s before its limit)"
            )


def run(
    asked: study.Study,
    folder: pathlib.Path,
    slurm: Slurm | None = None,
    *,
    cluster: str = "slurm",
) -> pathlib.Path:
    """Trains what the folder lacks in jobs, waits for them, and returns the path of report.html.

    Ctrl-C cancels the jobs, which save; calling `run` again goes on. Jobs outlive this process
    where it is killed: a second call adds jobs to those. jax of this process stays on the CPU.

    Args:
      folder, and the log: at the same path on every machine. Jobs' output goes to folder/slurm.
      cluster: "slurm", or "local": submitit's own stand-in, processes on this machine.

    Raises:
      ValueError: submitit is not installed, sbatch is not here; or as `workers.run` does.
      workers.Failed: a trial failed, with its traceback, or all jobs ended too early.
    """
    slurm = Slurm() if slurm is None else slurm
    submitit = check(cluster)
    folder = pathlib.Path(folder).absolute()
    asked = dataclasses.replace(asked, log=str(pathlib.Path(asked.log).absolute()))
    jax.config.update("jax_platforms", "cpu")
    log = workers.begin(asked, folder)
    params, ended = study.params_of(asked, log), []
    with nodes.expecting(asked, folder, log) as expected:
        if not nodes.complete(asked, folder, params):
            jobs = _submit(submitit, slurm, cluster, expected, folder)
            ended = _wait(jobs, expected, folder, params)
    return workers.finish(asked, folder, log, "; ".join(ended))


def check(cluster: str = "slurm") -> Any:
    """Returns submitit; raises ValueError where jobs cannot be submitted."""
    # It would set up this process's logging, and log to stdout, which is the result's.
    level = os.environ.pop(LOG_LEVEL, None)
    os.environ[LOG_LEVEL] = "NOCONFIG"
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            f"study: --engine slurm: {error}; expected submitit: pip install 'rankjax[slurm]'"
        ) from error
    finally:
        os.environ.pop(LOG_LEVEL)
        if level is not None:
            os.environ[LOG_LEVEL] = level
    if cluster == "slurm" and (missing := [x for x in ("sbatch", "srun") if not shutil.which(x)]):
        raise ValueError(
            f"study: --engine slurm: found no {', '.join(missing)} on PATH, expected a machine "
            "that submits jobs to SLURM"
        )
    return submitit


def _submit(
    submitit: Any, slurm: Slurm, cluster: str, expected: nodes.Expected, folder: pathlib.Path
) -> list[Any]:
    executor = submitit.AutoExecutor(
        folder=folder / "slurm" / "%j", cluster=cluster, slurm_max_num_timeout=REQUEUES
    )
    executor.update_parameters(
        name="rankjax",
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=slurm.cpus,
        gpus_per_node=slurm.gpus or None,
        timeout_min=slurm.minutes,
        mem_gb=slurm.memory,
        slurm_partition=slurm.partition,
        slurm_account=slurm.account,
        slurm_setup=list(slurm.setup) or None,
        slurm_additional_parameters={"requeue": True, **slurm.options},
        slurm_srun_args=[f"--cpus-per-task={slurm.cpus}"],  # srun does not take it from the job
        slurm_array_parallelism=slurm.jobs,
    )
    try:
        with executor.batch():
            return [executor.submit(Job(), expected, folder, slurm) for _ in range(slurm.jobs)]
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        raise ValueError(
            f"study: SLURM refused the jobs: {' '.join(str(error).split())}"
        ) from error


def _wait(
    jobs: list[Any], expected: nodes.Expected, folder: pathlib.Path, params: nodes.Params
) -> list[str]:
    """Shows the folder's progress until every row is there, or all jobs have ended; says how those
    ended that did so early. Whatever ends the waiting sooner cancels the jobs, which save."""
    open_ones, ended = list(jobs), []
    with workers.progress() as bars:
        bar = bars.add_task("trials", total=None)
        try:
            while open_ones:
                rows, _ = study.load_rows(folder)
                todo, known, complete = study.left(expected.study, rows, params)
                text = f"trials (jobs {', '.join(job.job_id for job in open_ones)})"
                bars.update(bar, completed=known - len(todo), total=known, description=text)
                if complete and not todo:
                    break
                nodes.lead(expected)
                time.sleep(POLL)
                for job in [job for job in open_ones if job.done()]:
                    open_ones.remove(job)
                    if said := _outcome(job):
                        ended.append(said)
                        workers.say(bars, said)
            if not open_ones and not ended:
                nodes.wait_for_rows(expected.study, folder, params)
        except BaseException:
            _cancel(open_ones)
            raise
        _cancel([job for job in open_ones if not _over(job)])  # those that still wait for a machine
    return ended


def _over(job: Any) -> bool:
    """A job ends by itself once nothing is left to train."""
    end = time.monotonic() + 15
    while not job.done() and time.monotonic() < end:
        time.sleep(0.2)
    return job.done()


def _cancel(jobs: list[Any]) -> None:
    for job in jobs:
        job.cancel(check=False)


def _outcome(job: Any) -> str:
    """How a job ended that found nothing more to do: ""; or that it was killed. Failed where a
    trial failed in it."""
    error = job.exception()
    if error is not None:
        return f"job {job.job_id} ended in state {job.state}: {error}"
    kind, said = job.result()
    if kind == "failed":
        raise workers.Failed(f"job {job.job_id}: {said}")
    return "" if kind == "complete" else f"job {job.job_id} on {said}"


class Job:
    """What runs in a job; by the name of its method `checkpoint` submitit knows that the job can be
    queued again."""

    def __call__(self, expected: nodes.Expected, folder: pathlib.Path, slurm: Slurm) -> tuple:
        """("complete", ""), or ("ended", machine and exit codes) where workers were killed, or
        ("failed", machine and reason): told, not raised, so that it is not lost in other words."""
        me, told = os.uname().nodename, []
        signal.signal(signal.SIGTERM, lambda *_: (told.append(True), _save(0)))
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if slurm.gpus else "cpu"
        try:
            nodes.check(expected)
            codes = workers.train(expected.study, folder, _places(slurm))
        except (ValueError, OSError, workers.Failed) as error:
            return "failed", f"{error}" if isinstance(error, nodes.Differs) else f"{me}: {error}"
        end = time.monotonic() + END
        while told and time.monotonic() < end:  # SLURM kills the job, or has it queued again
            time.sleep(1.0)
        if 0 in codes:
            return "complete", ""
        return "ended", f"{me}: workers ended with exit codes {codes}, expected 0"

    def checkpoint(self, expected: nodes.Expected, folder: pathlib.Path, slurm: Slurm) -> Any:
        """Called when the job is told to end and to be queued again: the trials are saved first."""
        import submitit

        _save(SAVE)
        return submitit.helpers.DelayedSubmission(Job(), expected, folder, slurm)


def _places(slurm: Slurm) -> list[int | str]:
    """A job's workers: a core each, or a GPU."""
    if not slurm.gpus:
        return list(cores.take(slurm.cpus))
    visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if len(visible) < slurm.gpus:
        raise ValueError(f"found GPUs {visible}, expected {slurm.gpus} in CUDA_VISIBLE_DEVICES")
    return visible[: slurm.gpus]


def _save(seconds: float) -> None:
    """Interrupts this job's workers, at which they save and end; waits for that so long."""
    workers_here = multiprocessing.active_children()
    for p in workers_here:
        os.kill(p.pid, signal.SIGINT)
    for p in workers_here:
        p.join(timeout=seconds)
