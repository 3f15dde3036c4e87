"""Devices that a step can be compiled for without having them: TPU pods, NVIDIA cards, CPUs here.

"v5e:16x16" is a slice of 16 x 16 chips, "h200:8" eight cards of one host, "cpu:8" eight simulated
devices of this machine.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one device. peak: bfloat16 FLOP/s; memory: bytes; bandwidth: of it, B/s.

    network: bytes/s that a device sends to its neighbours, all links together.
    """

    kind: str
    peak: float
    memory: float
    bandwidth: float
    network: float


# cloud.google.com/tpu/docs, pages of v4, v5e, v5p and v6e; NVIDIA's data sheet of the H200.
CHIPS = {
    "v4": Chip(kind="TPU v4", peak=275e12, memory=32 * 2**30, bandwidth=1.228e12, network=300e9),
    "v5e": Chip(
        kind="TPU v5 lite", peak=197e12, memory=16 * 2**30, bandwidth=0.819e12, network=200e9
    ),
    "v5p": Chip(kind="TPU v5", peak=459e12, memory=95 * 2**30, bandwidth=2.765e12, network=600e9),
    "v6e": Chip(
        kind="TPU v6 lite", peak=918e12, memory=32 * 2**30, bandwidth=1.64e12, network=400e9
    ),
    "h200": Chip(kind="NVIDIA H200", peak=989e12, memory=141e9, bandwidth=4.8e12, network=450e9),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
HOST = 8  # cards of a host, which NVLink joins
# Of an H200, as its compiler wants to know it (a GpuTargetConfig in protobuf text).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
# What libtpu reads where no TPU is: which machine to be.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """name as asked; chip None for CPUs, whose figures nobody publishes."""

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None


def find(name: str) -> Target:
    """The devices of a target.

    Raises:
      ValueError: an unknown target or topology, says what there is; what compiles for it is not
        installed, says what to install.
    """
    kind, _, size = name.partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"\d+(x\d+)*", size):
        raise ValueError(
            f"plan: found target {name!r}, expected KIND:SIZE, as v5e:16x16, v5p:8x8x8, h200:8 or "
            f"cpu:8; kinds: {', '.join((*CHIPS, 'cpu'))}"
        )
    if kind == "cpu":
        return Target(name=name, devices=_cpus(name, size), chip=None)
    make = _tpus if kind in TPUS else _cards
    return Target(name=name, devices=make(name, size), chip=CHIPS[kind])


def _cpus(name: str, size: str) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if not size.isdigit() or not 1 <= int(size) <= len(devices):
        raise ValueError(
            f"plan: found target {name!r} and {len(devices)} CPU devices; for more start with "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return devices[: int(size)]


def _tpus(name: str, size: str) -> Sequence[jax.Device]:
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"plan: {name} is compiled by libtpu, which is not installed: pip install 'jax[tpu]'"
        ) from error
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever libtpu says of a topology that there is not
        said = str(error).splitlines()[0]
        raise ValueError(f"plan: {name}: libtpu knows no such slice ({said})") from error


def _cards(name: str, size: str) -> Sequence[jax.Device]:
    if not size.isdigit() or not 1 <= int(size) <= HOST:
        raise ValueError(
            f"plan: found target {name!r}, expected h200:1 to h200:{HOST}, cards of one host"
        )
    try:
        return topologies.get_topology_desc(
            "h200", platform="cuda", target_config=H200, topology=f"1x1x{size}"
        ).devices
    except Exception as error:  # no CUDA plugin, or one that cannot compile without a card
        raise ValueError(
            f"plan: {name} is compiled by JAX's CUDA plugin, which does not answer "
            f"({str(error).splitlines()[0]}): pip install 'jax[cuda12]', on Linux"
        ) from error
