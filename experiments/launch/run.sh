#!/usr/bin/env bash
# One process of a training run. Every script beside this one ends here, so that a run is the same
# run wherever it is started: the same model, mesh and settings, which all go to `rankjax train`.
#
#   LOG=logs/world OUT=runs/one bash experiments/launch/run.sh --architecture hstu
#
# LOG: a prepared log. OUT: the run's folder; started again with the same one, it goes on.
# VENV: where rankjax is installed, if not on PATH.
set -euo pipefail
: "${LOG:?the folder of a prepared log}" "${OUT:?the folder of the run}"
PATH="${VENV:+$VENV/bin:}$PATH"
# exec: a scheduler's SIGTERM then reaches the training itself, which saves.
exec rankjax train "$LOG" --out "$OUT" "$@"
