#!/usr/bin/env bash
# All devices of this machine: eight GPUs, a TPU VM of one host, or a CPU.
#
#   LOG=logs/world OUT=runs/one bash experiments/launch/one_host.sh --mesh.strategy fsdp
#
# DEVICES=8: so many simulated devices on the CPU, to try a mesh before there is one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -n "${DEVICES:-}" ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
exec bash "$here/run.sh" "$@"
