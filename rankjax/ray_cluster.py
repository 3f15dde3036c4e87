"""A Ray cluster that runs already: connecting to it, and asking each of its nodes."""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ANSWER = 120  # seconds in which a node must answer
EXPECTED = "expected one: start it with `ray start --head`, or name it with --address HOST:PORT"


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """The ray module, connected to an existing cluster; a connection that is there is kept.

    Until it is closed, what is printed goes to stderr: Ray's threads print there too.

    address: host:port of the cluster's head; None or "auto" is RAY_ADDRESS, or the cluster of this
      machine. None is started here.
    Raises ValueError: Ray is not installed, the address is none, or no cluster answers there.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f"found no Ray ({error}), expected it installed: pip install 'rankjax[ray]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _check_address(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own later default
    with contextlib.redirect_stdout(sys.stderr):  # what Ray has to say; stdout is the result's
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError) as error:  # none, or one of another version
            where = "this machine" if address == "auto" else address
            raise ValueError(
                f"found no Ray cluster at {where} ({line(error)}), {EXPECTED}"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raises ValueError where nobody listens; Ray itself would try for minutes."""
    match = re.fullmatch(r"(.+):(\d+)", address)
    if match is None or "://" in address:
        raise ValueError(f"found Ray address {address!r}, expected HOST:PORT or auto")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"found no Ray cluster at {address} ({error}), {EXPECTED}") from error


def alive(ray: Any) -> list[dict[str, Any]]:
    """Of `ray.nodes()`, those that run."""
    return [node for node in ray.nodes() if node["Alive"]]


def answers(
    ray: Any,
    nodes: Sequence[dict[str, Any]],
    look: Callable[..., Any],
    *args: Any,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Any]]:
    """(name of a node, what `look(*args)` returns there) for each of the nodes.

    environment: of the processes that look. Raises ValueError for a node where it cannot be called,
    and in the end for those that do not answer in ANSWER seconds; both are named.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    env_vars = {"env_vars": dict(environment or {})}
    task, asked = ray.remote(num_cpus=0, runtime_env=env_vars)(look), {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(scheduling_strategy=there).remote(*args)
        asked[reference] = node["NodeManagerHostname"]
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)
    for reference in answered:
        try:
            yield asked[reference], ray.get(reference)
        except ray.exceptions.RayError as error:  # such as: rankjax is not installed there
            raise ValueError(
                f"node {asked[reference]}: found {line(error)}, expected rankjax as here"
            ) from error
    if silent:
        late = sorted(asked[reference] for reference in silent)
        raise ValueError(f"nodes {late}: found no answer in {ANSWER} s, expected one of each")


def line(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split())
