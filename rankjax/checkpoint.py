"""Orbax: model, optimizer, tables and (seed, step), in one atomic save.

The batch of a step is a pure function of (seed, step), so these two numbers are all that is needed
to rebuild the Grain pipeline at the same place, for any number of hosts and workers. On many hosts,
which share the folder, all of them save and restore together, each what its devices hold.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from rankjax import evaluate, hosts

Tree = TypeVar("Tree")


@contextlib.contextmanager
def _manager(folder: pathlib.Path, keep: int = 1) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        # A save counts when its folder is renamed into place; what a killed run left half-written
        # is swept away here and never restored.
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    with ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options) as manager:
        yield manager


def save(folder: pathlib.Path, step: int, tree: Any, meta: dict[str, Any], keep: int = 1) -> None:
    """Writes `tree` (arrays) and `meta` (JSON) as step `step`; older steps go once it is complete.

    Raises:
      OSError: the save failed (a full disk, say); the newest complete step is still there.
    """
    try:
        with _manager(folder, keep) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
    except (OSError, ValueError) as error:
        kept = latest(folder)
        raise OSError(
            f"{folder}: saving step {step} failed ({error}); "
            + ("nothing had been saved before" if kept is None else f"step {kept} is still there")
        ) from error


def steps(folder: pathlib.Path) -> list[int]:
    """Complete steps, oldest first. A folder that does not exist has none."""
    if not pathlib.Path(folder).is_dir():
        return []
    return sorted(int(p.name) for p in pathlib.Path(folder).iterdir() if p.name.isdigit())


def latest(folder: pathlib.Path) -> int | None:
    """The newest complete step, or None."""
    return max(steps(folder), default=None)


def restore(
    folder: pathlib.Path,
    like: Tree,
    step: int | None = None,
    rows: Mapping[str, int] | None = None,
    pack: int = 1,
) -> tuple[Tree, dict]:
    """(tree, meta) of `step` (default: the newest), in the shapes, dtypes, shardings of `like`.

    Devices and hosts may be others than those that saved.

    Args:
      rows: rows of every table, without what fills them up to a multiple of the devices: arrays
        below "tables" and "table_optimizer" of `like` may have more, or fewer, of those.
      pack: rows in a line of the tables' embeddings (lines.py).
    Raises:
      FileNotFoundError: there is no complete step.
      ValueError: what was saved does not have the shapes of `like`, or cannot be read.
    """
    step = latest(folder) if step is None else step
    if step is None or step not in steps(folder):
        raise FileNotFoundError(f"{folder}: found steps {steps(folder)}, expected step {step}")
    where = f"{folder}, step {step}"
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        saved = _saved_shapes(pathlib.Path(folder).absolute() / str(step) / "state")
    except Exception as error:  # whatever Orbax meets in files that are not what they should be
        raise ValueError(_broken(folder, step, error)) from error
    refilled, wanted = False, jax.tree_util.tree_leaves_with_path(abstract)
    if names := saved.keys() ^ {_name(path) for path, _ in wanted}:
        raise ValueError(
            f"{where}: found arrays {sorted(names & saved.keys())[:3]} that are not expected, and "
            f"expected {sorted(names - saved.keys())[:3]}: it was saved by another model, or with "
            "another way to compute its layers"
        )
    for path, want in wanted:
        name = _name(path)
        found = saved[name]
        if found[0] == want.shape:
            continue
        least = _least(name, rows or {}, pack)
        filled = least is not None and min(found[0][0], want.shape[0]) >= least
        if not filled or found[0][1:] != want.shape[1:]:
            other = least is not None and found[0][1:] != want.shape[1:]
            packed = " (another width, or tables.pack?)" if other else ""
            raise ValueError(
                f"{where}, {jax.tree_util.keystr(path)}: found {found[1]}{list(found[0])}, "
                f"expected {want.dtype}{list(want.shape)}{packed}"
            )
        refilled = True
    # Not strict: Orbax cuts off, or adds zeros. Only rows that nobody asks for.
    state = ocp.args.StandardRestore(abstract, strict=not refilled)
    try:
        with _manager(folder) as manager:
            found = manager.restore(
                step, args=ocp.args.Composite(state=state, meta=ocp.args.JsonRestore())
            )
    except Exception as error:
        raise ValueError(_broken(folder, step, error)) from error
    if rows is not None and found["meta"].get("rows", rows) != rows:
        raise ValueError(f"{where}: found tables of {found['meta']['rows']} rows, expected {rows}")
    return found["state"], found["meta"]


def _least(name: str, rows: Mapping[str, int], pack: int) -> int | None:
    """The length that an array of a table has at least; None of other arrays."""
    part, *below = name.split("/")
    if "table" not in part or below[0] not in rows:
        return None
    return rows[below[0]] // (pack if (part, below[-1]) == ("tables", "embedding") else 1)


def _saved_shapes(state: pathlib.Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, dtype)} of the arrays of a saved tree."""
    found = ocp.StandardCheckpointHandler().metadata(state)
    found = getattr(found, "tree", found)
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: hasattr(x, "shape"))
    return {_name(path): (tuple(x.shape), np.dtype(x.dtype)) for path, x in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _broken(folder: pathlib.Path, step: int, error: Exception) -> str:
    others = [x for x in steps(folder) if x != step]
    return (
        f"{folder}, step {step}: cannot be read ({type(error).__name__}: {error}); expected what "
        f"`checkpoint.save` writes, whole. If files of it are lost, then without the folder {step} "
        "training goes on from " + (f"step {max(others)}" if others else "the start")
    )


def _step_of(line: str) -> float:
    """Of a line of metrics; a line that a killed run left half-written counts as later than all."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


class Journal:
    """A run's folder: checkpoints, predictions made before each update, and lines of metrics.

    Predictions are written before the checkpoint that covers them, so that a run killed between the
    two only leaves a part that `resume` deletes.
    """

    def __init__(self, folder: pathlib.Path | None, tasks: int):
        self.folder, self.tasks = folder, tasks
        # Host 0 writes the lines, each host its own predictions.
        self.host, self.hosts = jax.process_index(), jax.process_count()
        self.scored: list[tuple[np.ndarray, np.ndarray]] = []
        self.steps: list[np.ndarray] = []  # of every valid impression in `scored`
        self.saved_step, self.saved_parts = 0, 0
        self.meta: dict[str, Any] = {}
        self.board = None

    def resume(self, state: Any, meta: dict[str, Any]) -> Any:
        """The newest saved state, or `state`; `meta` must be the saved run's ("rows" tables')."""
        self.meta = meta
        (self.folder / "progressive").mkdir(parents=True, exist_ok=True)
        # As host 0 sees the folder: a file system may show the others a moment ago.
        mine = latest(self.folder / "checkpoints")
        newest = int(hosts.gathered(np.asarray([-1 if mine is None else mine]))[0][0])
        if newest >= 0:
            known = meta["rows"], meta.get("pack", 1)
            state, found = restore(self.folder / "checkpoints", state, newest, *known)
            if any(found.get(key, value) != value for key, value in meta.items()):
                raise ValueError(f"{self.folder}: found a run of {found}, expected {meta}")
        step = int(state.step)
        # The others may write parts only when old ones are gone.
        hosts.first_does(lambda: self._resume_files(step))
        self.saved_step, self.saved_parts = step, len(self.scored)
        return state

    def _resume_files(self, step: int) -> None:
        """Host 0 holds all predictions of before; what was written after the step goes."""
        for part in sorted((self.folder / "progressive").glob("*.npz")):
            if int(part.stem.split("-")[1]) > step:
                part.unlink()
                continue
            with np.load(part, allow_pickle=False) as saved:
                self.scored.append((saved["impression"], saved["logits"]))
                self.steps.append(saved["step"])
        lines = self.folder / "metrics.jsonl"
        if lines.exists():
            kept = [x for x in lines.read_text().splitlines() if _step_of(x) <= step]
            temporary = lines.with_suffix(".tmp")
            temporary.write_text("".join(f"{x}\n" for x in kept))
            temporary.rename(lines)
        from tensorboardX import SummaryWriter  # imported late: it costs half a second

        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)

    def add(self, step: int, impression: np.ndarray, logits: np.ndarray) -> None:
        """Predictions of a step, [R, C] and [R, C, K]."""
        self.scored.append((impression, logits))
        self.steps.append(np.full(np.count_nonzero(impression >= 0), step, np.int64))

    def write(self, line: dict[str, Any]) -> None:
        if self.folder is None or self.host:
            return
        with (self.folder / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step":
                self.board.add_scalar(name, value, line["step"])

    def save(self, state: Any) -> None:
        if self.folder is None or state is None or int(state.step) == self.saved_step:
            return
        step = int(state.step)
        new = evaluate.Scored.of(self.scored[self.saved_parts :], self.tasks)
        own = f"-{self.host}" if self.hosts > 1 else ""
        part = self.folder / "progressive" / f"{self.saved_step:08d}-{step:08d}{own}.npz"
        with part.with_suffix(".tmp").open("wb") as f:
            steps = np.concatenate(self.steps[self.saved_parts :])
            np.savez(f, impression=new.impression, logits=new.logits, step=steps)
        part.with_suffix(".tmp").rename(part)
        save(self.folder / "checkpoints", step, state, self.meta)
        if self.board is not None:
            self.board.flush()
        self.saved_step, self.saved_parts = step, len(self.scored)

    def close(self) -> None:
        """Ends the thread that writes TensorBoard files."""
        if self.board is not None:
            self.board.close()
