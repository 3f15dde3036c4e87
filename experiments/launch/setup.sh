#!/usr/bin/env bash
# A fresh machine (Debian or Ubuntu): mounts the folder that all hosts share, and installs rankjax
# from this tree into VENV. tpu_vm.sh and sky.yaml run it on every host.
#
#   EXTRA=tpu NFS=10.0.0.2:/files bash experiments/launch/setup.sh
#
# EXTRA: tpu or gpu, which of rankjax's extras. NFS: what to mount at MOUNT; not needed where the
# hosts share a folder already. A bucket does not do: a checkpoint is renamed once it is complete.
set -euo pipefail
: "${EXTRA:?tpu or gpu}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${VENV:-$HOME/rankjax-venv}
MOUNT=${MOUNT:-/mnt/rankjax}

if [[ -n "${NFS:-}" ]] && ! mountpoint -q "$MOUNT"; then
  sudo apt-get update -qq
  sudo apt-get install -yqq nfs-common
  sudo mkdir -p "$MOUNT"
  sudo mount -t nfs "$NFS" "$MOUNT"
fi

# The machine's own Python may be older than 3.11; uv brings one.
PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv --quiet --allow-existing --python 3.12 "$VENV"
uv pip install --quiet --python "$VENV/bin/python" "${root}[$EXTRA]"
