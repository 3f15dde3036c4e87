"""What a study will train and what that takes, before any of it is trained.

Trials are named by `study.requests`, answered with made-up results until it asks for nothing more.
Which of the swept rates wins does not change what a trial costs, and how many trials there are only
at one place: a size that two ladders share is one trial if both interpolate the same rate for it,
and two if not. The made-up winners are the same everywhere, so all such trials coincide; those that
may turn out apart are counted on top, as `extra`: the least and the most that there can be. With
one rate an architecture nothing is open.

FLOPs are exact. Seconds follow from a few measured sizes (probe.py): along a ladder they are
straight lines between those, in the logarithms of FLOPs and seconds.
"""

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rankjax import train
from rankjax.data import event_log, loader
from rankjax.scaling import sizes, study, trial

Shape = tuple[int, int, int]  # rows, S, C of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A trial to be run.

    wave: of its architecture; a wave begins when the one before is done, as choices are made on it.
    trains: False where it was trained for a choice before and is only evaluated, on test too.
    extra: counted, but it may turn out to be a trial that is counted already.
    """

    request: study.Request
    wave: int
    trains: bool = True
    extra: bool = False

    @property
    def spans(self) -> tuple[str, ...]:
        """Evaluated after training."""
        return ("validation", "test") if self.request.test else ("validation",)


def jobs(asked: study.Study, rows: study.Rows, params: Callable[[Any], int]) -> list[Job]:
    """What is left to run where `rows` are there already; see the module for what is made up."""
    made, found = dict(rows), []
    open_ends = _open(asked, study.requests(asked, rows, params)[0])
    for wave in itertools.count():
        wanted, _ = study.requests(asked, made, params)
        todo: dict[str, study.Request] = {}
        for r in sorted(wanted, key=lambda r: not r.test):
            if study.missing(r, made):
                todo.setdefault(r.trial.id, r)
        if not todo:
            break
        for name, r in todo.items():
            found.append(Job(request=r, wave=wave, trains=name not in made))
            guess = {"validation_ne": _guess(asked, r.trial)}
            made[name] = {**guess, **made.get(name, {}), "test_read": r.test}
    last = max((job.wave for job in found), default=0)
    return found + [Job(request=r, wave=last, extra=True) for r in open_ends(wanted)]


def _guess(asked: study.Study, spec: trial.Trial) -> float:
    """A made-up loss: the middle of each sweep wins."""
    rates = asked.rates_of(spec.architecture)
    tables, stds = asked.table_rates, asked.embedding_stds
    given = spec.training.optimizer.learning_rate, spec.training.tables
    pairs = (
        (given[0], rates[len(rates) // 2]),
        (given[1].learning_rate, tables[len(tables) // 2]),
        (given[1].init_std, stds[-1]),
    )
    return sum(abs(math.log(x / middle)) for x, middle in pairs)


def _open(
    asked: study.Study, known: list[study.Request]
) -> Callable[[list[study.Request]], list[study.Request]]:
    """All requests -> those final ones that coincide with others only because of made-up winners.

    known: requests that follow from real rows: of these nothing is open.
    """
    decided = {(r.ladder.name, r.trial.id) for r in known if r.stage == "final"}

    def inner(r: study.Request) -> bool:
        """The rate is interpolated between two choices of which one at least is made up."""
        between = 0 < r.size < len(r.ladder.configs) - 1
        return r.stage == "final" and between and len(asked.rates_of(r.ladder.architecture)) > 1

    def extra(wanted: list[study.Request]) -> list[study.Request]:
        trials = collections.defaultdict(list)
        for r in wanted:
            trials[r.trial.id].append((r, inner(r)))
        found = []
        for name, group in trials.items():
            free = [r for r, is_inner in group if is_inner and (r.ladder.name, name) not in decided]
            found += free if len(free) < len(group) else free[1:]
        return found

    return extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a trial computes, whatever its rates and seed.

    training_flops: as its row will say; evaluation_flops: {span: FLOPs}, of valid entries too.
    steps: {shape: (steps of the pass, FLOPs of one as padded)}; scoring: {span: the same}.
    """

    model: Any
    dense_params: int
    training_flops: float
    evaluation_flops: dict[str, float]
    steps: dict[Shape, tuple[int, float]]
    scoring: dict[str, dict[Shape, tuple[int, float]]]

    def flops(self, job: Job) -> tuple[float, float]:
        """(training, evaluation) of a job."""
        scored = sum(self.evaluation_flops[span] for span in job.spans)
        return (self.training_flops if job.trains else 0.0), scored


def work(spec: trial.Trial, log: event_log.EventLog) -> Work:
    """Counts a trial's FLOPs and batches from the lengths of its samples; no batch is made."""
    width = spec.training.tables.width
    train_samples = trial.samples_of(log, spec.samples, "train", spec.budget)
    epoch = train.batches(log, spec.training, train_samples)
    columns = sizes.columns(spec.model, spec.training, log.schema, epoch)

    def forward(batches: loader.Batches) -> Any:
        return sizes.forward_flops(spec.model, log.schema, width, batches.samples.one_time)

    evaluation, scoring = {}, {}
    for span in ("validation", "test"):
        in_time = dataclasses.replace(spec.training, order="time")
        held_out = trial.samples_of(log, spec.samples, span, None)
        batches = train.batches(log, in_time, held_out)
        lengths = held_out.event_counts, held_out.candidate_counts
        evaluation[span] = float(forward(batches)(lengths).sum())
        scoring[span] = _padded(batches, forward(batches), 1)
    return Work(
        model=spec.model,
        dense_params=columns["dense_params"],
        training_flops=columns["training_flops"],
        evaluation_flops=evaluation,
        steps=_padded(epoch, forward(epoch), 3),
        scoring=scoring,
    )


def _padded(batches: loader.Batches, forward: Any, passes: int) -> dict[Shape, tuple[int, float]]:
    """{shape: (batches, FLOPs of one)}, every row taken as full."""
    found = {}
    for shape, count in shapes(batches).items():
        rows, S, C = shape
        found[shape] = count, passes * rows * float(forward((np.array([S]), np.array([C])))[0])
    return found


def shapes(batches: loader.Batches) -> collections.Counter[Shape]:
    """How many batches of a pass have each shape."""
    pairs = (batches.shape(step) for step in range(len(batches)))
    return collections.Counter((batches.rows, *pair) for pair in pairs)


def usual(counts: Mapping[Shape, Any]) -> Shape:
    """The shape of most batches of Work.steps, Work.scoring or `shapes`."""
    return max(counts, key=lambda shape: (counts[shape], shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one size took on one of the study's processes; probe.py measures it.

    flops, score_flops: of the padded batches timed; step, score: seconds of one of them.
    compile, score_compile: seconds for one shape of batches. first: seconds that a process spends
      once a model, begin: once a trial, before the first step. All nan where the size does not fit.
    memory_bytes: of the training step at its largest shape: state, batch and temporaries; None
      where the compiler refused it for its memory. limit_bytes: what a process may take, if known.
    """

    flops: float
    step: float
    compile: float
    score_flops: float
    score: float
    score_compile: float
    first: float
    begin: float
    memory_bytes: int | None
    limit_bytes: int | None = None

    @property
    def fits(self) -> bool:
        return math.isfinite(self.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of a job: `run` always, and `once` what a process does once: {what: seconds}."""

    job: Job
    run: float
    once: dict[Hashable, float]


def timed(job: Job, spec: Work, measured: Iterable[Measured]) -> Timed:
    """The seconds of a job from measured sizes of its ladder; nan where none of them fits."""
    points = [m for m in measured if m.fits]
    step = curve([(m.flops, m.step) for m in points], grows=True)
    score = curve([(m.score_flops, m.score) for m in points], grows=True)
    whole = spec.steps[usual(spec.steps)][1]
    size = {
        name: curve([(m.flops, getattr(m, name)) for m in points])(whole)
        for name in ("compile", "score_compile", "first", "begin")
    }
    run, once = size["begin"], {("first", spec.model): size["first"]}
    if job.trains:
        run += sum(count * step(flops) for count, flops in spec.steps.values())
        once |= {("step", spec.model, shape): size["compile"] for shape in spec.steps}
    for span in job.spans:
        run += sum(count * score(flops) for count, flops in spec.scoring[span].values())
        shapes = spec.scoring[span]
        once |= {("score", spec.model, shape): size["score_compile"] for shape in shapes}
    return Timed(job=job, run=run, once=once)


def curve(points: Sequence[tuple[float, float]], grows: bool = False) -> Callable[[float], float]:
    """FLOPs -> seconds through (FLOPs, seconds): lines in the logarithms that never fall.

    Below the least FLOPs: as there. Beyond the most: as there, or, if it `grows`, in proportion.
    Without points nan.
    """
    if not points:
        return lambda flops: math.nan
    x, y = np.log(np.maximum(np.array(sorted(points), np.float64).T, 1e-12))
    y = np.maximum.accumulate(y)

    def at(flops: float) -> float:
        here = math.log(max(flops, 1e-12))
        beyond = max(0.0, here - x[-1]) if grows else 0.0
        return float(np.exp(np.interp(here, x, y) + beyond))

    return at


def schedule(timed: Sequence[Timed], workers: int) -> tuple[float, list[float]]:
    """(seconds until the last job ends, seconds of each job) on so many processes.

    As `study.work` does it: whoever is free takes a job of the model that it trained last, or else
    the first that may begin. Architectures wait for their own choices only. Nan if a job's is nan.
    """
    waves: dict[str, dict[int, list[int]]] = {}
    for i, one in enumerate(timed):
        mine = waves.setdefault(one.job.request.ladder.architecture, {})
        mine.setdefault(one.job.wave, []).append(i)
    chains = {name: [mine[w] for w in sorted(mine)] for name, mine in waves.items()}
    ready = [i for chain in chains.values() for i in chain[0]]
    left = {name: len(chain[0]) for name, chain in chains.items()}
    spent, now = [math.nan] * len(timed), 0.0
    done: list[set] = [set() for _ in range(workers)]
    last: list[Any] = [None] * workers
    idle, running = list(range(workers)), []
    while ready or running:
        while ready and idle:
            worker = idle.pop(0)
            model = lambda i: timed[i].job.request.trial.model
            job = min(ready, key=lambda i: (model(i) != last[worker], timed[i].job.request.test))
            ready.remove(job)
            fresh = sum(s for what, s in timed[job].once.items() if what not in done[worker])
            spent[job] = timed[job].run + fresh
            if not math.isfinite(spent[job]):
                return math.nan, [math.nan] * len(timed)
            done[worker] |= timed[job].once.keys()
            last[worker] = model(job)
            heapq.heappush(running, (now + spent[job], worker, job))
        now, worker, job = heapq.heappop(running)
        idle.append(worker)
        name = timed[job].job.request.ladder.architecture
        left[name] -= 1
        if not left[name] and len(chains[name]) > 1:
            del chains[name][0]
            ready += chains[name][0]
            left[name] = len(chains[name][0])
    return now, spent
