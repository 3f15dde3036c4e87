#!/usr/bin/env bash
# A slice of Cloud TPUs, one host or many, from a laptop with `gcloud`. From the repository:
#
#   export TPU=rankjax-1 ZONE=us-east5-a TYPE=v5p-64 RUNTIME=v2-alpha-tpuv5
#   bash experiments/launch/tpu_vm.sh create     # or queue: waits for free capacity; SPOT=1: spot
#   NFS=10.0.0.2:/files bash experiments/launch/tpu_vm.sh setup
#   LOG=/mnt/rankjax/log OUT=/mnt/rankjax/run \
#     bash experiments/launch/tpu_vm.sh train --architecture hstu --mesh.strategy fsdp
#   bash experiments/launch/tpu_vm.sh watch      # the words of the first host; Ctrl-C ends looking
#   bash experiments/launch/tpu_vm.sh stop       # saves
#   bash experiments/launch/tpu_vm.sh delete     # or unqueue; until then the slice is paid for
#
# Project and account are those of `gcloud config`. The hosts get the tree as it is committed.
set -euo pipefail
: "${TPU:?a name for the slice}" "${ZONE:?the zone, as us-east5-a}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

tpus() { gcloud compute tpus "$@" --zone="$ZONE"; }
on_hosts() { tpus tpu-vm ssh "$TPU" --worker="$1" --command="$2"; }
word() { printf '%q' "$1"; }
words() { (($# == 0)) || printf ' %q' "$@"; }

create() {
  : "${TYPE:?the slice, as v5p-64}" "${RUNTIME:?the image for it, as v2-alpha-tpuv5}"
  tpus tpu-vm create "$TPU" --accelerator-type="$TYPE" --version="$RUNTIME" ${SPOT:+--spot}
}

queue() {
  : "${TYPE:?the slice, as v5p-64}" "${RUNTIME:?the image for it, as v2-alpha-tpuv5}"
  tpus queued-resources create "$TPU" --node-id="$TPU" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot}
  echo "state: gcloud compute tpus queued-resources describe $TPU --zone=$ZONE"
}

setup() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder's name now, not later
  trap "rm -rf '$folder'" EXIT
  git -C "$root" archive --format=tar.gz --output="$folder/rankjax.tar.gz" HEAD
  tpus tpu-vm scp "$folder/rankjax.tar.gz" "$TPU:" --worker=all
  on_hosts all "mkdir -p rankjax && tar -xzf rankjax.tar.gz -C rankjax &&
    EXTRA=tpu NFS=$(word "${NFS:-}") bash rankjax/experiments/launch/setup.sh"
}

train() {
  : "${LOG:?the folder of a prepared log, as the hosts see it}" "${OUT:?a folder that they share}"
  # It goes on when the laptop sleeps.
  on_hosts all "LOG=$(word "$LOG") OUT=$(word "$OUT") VENV=\$HOME/rankjax-venv \
setsid nohup bash rankjax/experiments/launch/run.sh --join.auto$(words "$@") \
>train.log 2>&1 </dev/null & echo \$! >train.pid"
}

# shellcheck disable=SC2016 # for the hosts' shells
stop() { on_hosts all 'kill -TERM "$(cat train.pid)"'; }
watch() { on_hosts 0 "tail -n 50 -f train.log"; }
delete() { tpus tpu-vm delete "$TPU" --quiet; }
unqueue() { tpus queued-resources delete "$TPU" --force --quiet; }

case "${1:-}" in
  create | queue | setup | train | watch | stop | delete | unqueue) "$@" ;;
  *)
    echo "tpu_vm.sh: found '${1:-}', expected create, queue, setup, train, watch, stop, delete or" \
      "unqueue" >&2
    exit 2
    ;;
esac
