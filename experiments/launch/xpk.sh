#!/usr/bin/env bash
# TPU slices of a GKE cluster, by xpk (`pip install xpk`, and Docker, which builds the image). From
# the repository, whose folder goes into the image:
#
#   export NAME=rankjax-1 CLUSTER=tpus ZONE=us-east5-a TYPE=v5p-64 STORAGE=files
#   LOG=/mnt/rankjax/log OUT=/mnt/rankjax/run \
#     bash experiments/launch/xpk.sh --architecture hstu --mesh.strategy fsdp
#   xpk workload list --cluster "$CLUSTER" --zone "$ZONE"
#   xpk workload delete --workload "$NAME" --cluster "$CLUSTER" --zone "$ZONE"
#
# STORAGE: a file system that all pods share, as `xpk storage attach files --type gcpfilestore
# --mount-point /mnt/rankjax ...` names it. SLICES: so many slices (then --mesh.replica SLICES).
# A pod that is preempted or told to stop saves, and is started again, RESTARTS times at most.
set -euo pipefail
: "${NAME:?a name for the workload}" "${CLUSTER:?the cluster}" "${ZONE:?its zone}"
: "${TYPE:?the slice, as v5p-64}" "${STORAGE:?a storage that is attached to the cluster}"
: "${LOG:?the folder of a prepared log, in the storage}" "${OUT:?a folder in the storage}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
word() { printf '%q' "$1"; }
words() { (($# == 0)) || printf ' %q' "$@"; }

exec xpk workload create --workload "$NAME" --cluster "$CLUSTER" --zone "$ZONE" \
  --tpu-type "$TYPE" --num-slices "${SLICES:-1}" --storage "$STORAGE" \
  --base-docker-image "${IMAGE:-python:3.12}" --script-dir "$root" \
  --max-restarts "${RESTARTS:-10}" --termination-grace-period-seconds 120 \
  --command "pip install --quiet '.[tpu]' && LOG=$(word "$LOG") OUT=$(word "$OUT") \
exec bash experiments/launch/run.sh --join.auto$(words "$@")"
