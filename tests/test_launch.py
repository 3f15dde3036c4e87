"""experiments/launch: every script comes down to the same `rankjax train`, on every process.

No cloud is asked. Small programs stand in for `gcloud`, `srun`, `xpk` and the like: they write down
how they were called, and run on this machine what they would have run on others. What the real
ones make of the same words is not tested.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())
# Words that a shell would take apart.
ASKED = ("--architecture", "hstu", "--name", "two words; $HOME")
RUN = {"LOG": "/shared/a log", "OUT": "/shared/a run"}

# Writes down its name, LOG, OUT, VENV, the devices it may take, and its arguments.
NOTE = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "${LOG:-}" "${OUT:-}" "${JAX_LOCAL_DEVICE_IDS:-}" "$@"; echo; } >>"$CALLS"
"""
# What the programs do besides.
STANDINS = {
    "rankjax": 'exit "${STATUS:-0}"\n',
    "srun": """
while [[ "${1:-}" == --* ]]; do shift; done
exec "$@"
""",
    # A host is a folder of its own below $HOSTS. `--command` runs there, `scp` copies to there.
    "gcloud": """
for word in "$@"; do case "$word" in
  --worker=all) hosts="0 1" ;;
  --worker=0) hosts="0" ;;
  --command=*) command="${word#--command=}" ;;
esac; done
if [[ "$*" == *" scp "* ]]; then
  for host in $hosts; do mkdir -p "$HOSTS/$host" && cp "$5" "$HOSTS/$host/"; done
elif [[ -n "${command:-}" ]]; then
  for host in $hosts; do
    (cd "$HOSTS/$host" && env -u LOG -u OUT HOME="$PWD" bash -c "$command")
  done
fi
""",
    "xpk": """
for word in "$@"; do
  [[ "${before:-}" == --command ]] && command="$word"
  before="$word"
done
env -u LOG -u OUT bash -c "$command"
""",
    "mountpoint": "exit 1\n",
} | dict.fromkeys(("sudo", "uv", "curl", "pip", "scontrol"), "")


@pytest.fixture
def run(tmp_path):
    """Runs a command of bash with the stand-ins first on PATH; returns what they wrote down."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, does in STANDINS.items():
        (programs / name).write_text(NOTE + does)
        (programs / name).chmod(0o755)
    (tmp_path / "hosts").mkdir()

    def started(*command: str, status: int = 0, **given: str) -> list[list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        kept = {k: os.environ[k] for k in ("TMPDIR",) if k in os.environ}
        environment = kept | given
        environment |= {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)}
        environment |= {"CALLS": str(calls), "HOSTS": str(tmp_path / "hosts")}
        options = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run(("bash", *command), timeout=60, **options)
        assert done.returncode == status, done.stdout + done.stderr
        started.said = done.stdout + done.stderr
        return [shlex.split(line) for line in calls.read_text().splitlines()]

    return started


def trained(*more: str, log: str = RUN["LOG"], out: str = RUN["OUT"], devices: str = ""):
    """What `rankjax` writes down when it is to train."""
    return ["rankjax", log, out, devices, "train", log, "--out", out, *more]


@pytest.mark.parametrize("path", [x for x in SCRIPTS if x.suffix != ".yaml"], ids=lambda x: x.name)
def test_a_script_is_one_and_says_how_it_is_called(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert f"experiments/launch/{path.name}" in text.split("set -euo pipefail")[0]
    subprocess.run(("bash", "-n", path), check=True)
    if shutil.which("shellcheck"):
        subprocess.run(("shellcheck", path), check=True)


@pytest.mark.parametrize("name", ["run.sh", "one_host.sh"])
def test_one_host(run, name):
    script = f"experiments/launch/{name}"
    assert run(script, *ASKED, **RUN) == [trained(*ASKED)]
    run(script, status=1, OUT="x")
    assert "LOG: the folder of a prepared log" in run.said
    run(script, status=1, LOG="x")
    assert "OUT: the folder of the run" in run.said


def test_slurm_gives_a_process_all_cards_of_its_node(run):
    node = RUN | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "96"}
    cards = node | {"SLURM_GPUS_ON_NODE": "4"}
    step, process = run("experiments/launch/slurm.sbatch", *ASKED, **cards)
    assert step[0] == "srun" and "--cpus-per-task=96" in step
    assert process == trained("--join.auto", *ASKED, devices="0,1,2,3")
    _, process = run("experiments/launch/slurm.sbatch", *ASKED, **node)
    assert process == trained("--join.auto", *ASKED)
    run("experiments/launch/slurm.sbatch", status=1, **RUN)
    assert "start this with sbatch" in run.said


def test_a_slurm_job_that_was_told_to_stop_is_queued_again(run):
    node = RUN | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8"}
    calls = run("experiments/launch/slurm.sbatch", status=130, STATUS="130", **node)
    assert calls[-1][0] == "scontrol" and calls[-1][-2:] == ["requeue", "7"]
    calls = run("experiments/launch/slurm.sbatch", status=1, STATUS="1", **node)
    assert "scontrol" not in [call[0] for call in calls]


TPU = {"TPU": "one", "ZONE": "us-east5-a"}


def test_a_slice_of_tpus_is_made_and_given_back(run):
    slice_ = TPU | {"TYPE": "v5p-64", "RUNTIME": "v2-alpha-tpuv5"}
    script = "experiments/launch/tpu_vm.sh"
    (made,) = run(script, "create", **slice_)
    assert made[4:8] == ["compute", "tpus", "tpu-vm", "create"]
    assert {"one", "--accelerator-type=v5p-64", "--version=v2-alpha-tpuv5"} < set(made)
    assert "--zone=us-east5-a" in made and "--spot" not in made
    assert "--spot" in run(script, "create", SPOT="1", **slice_)[0]
    (queued,) = run(script, "queue", SPOT="1", **slice_)
    assert queued[6:8] == ["queued-resources", "create"] and "--node-id=one" in queued
    assert run(script, "delete", **TPU)[0][6:9] == ["tpu-vm", "delete", "one"]
    assert run(script, "unqueue", **TPU)[0][6:9] == ["queued-resources", "delete", "one"]


def test_every_host_of_a_slice_gets_the_tree_and_trains(run, tmp_path):
    script = "experiments/launch/tpu_vm.sh"
    calls = run(script, "setup", NFS="10.0.0.2:/files", **TPU)
    installs = [call for call in calls if call[0] == "uv" and "install" in call]
    assert [call[-1] for call in installs] == [f"{tmp_path}/hosts/{x}/rankjax[tpu]" for x in (0, 1)]
    mounts = [call for call in calls if call[0] == "sudo" and "mount" in call]
    assert [call[-2:] for call in mounts] == [["10.0.0.2:/files", "/mnt/rankjax"]] * 2

    run(script, "train", *ASKED, **TPU, **RUN)
    for host in (tmp_path / "hosts").iterdir():
        wait_for_end(int((host / "train.pid").read_text()))
    lines = (tmp_path / "calls").read_text().splitlines()
    processes = [line for line in lines if line.startswith("rankjax")]
    assert len(processes) == 2 and len(set(processes)) == 1
    assert shlex.split(processes[0]) == trained("--join.auto", *ASKED)


def wait_for_end(process: int) -> None:
    """Of a process that is no child of this one."""
    for _ in range(600):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} still runs")


@pytest.mark.parametrize("asked", [(), ("fly",)])
def test_what_is_not_known_of_a_slice_is_told(run, asked):
    run("experiments/launch/tpu_vm.sh", *asked, status=2, **TPU)
    assert "expected create, queue, setup, train" in run.said


def test_what_is_missing_of_a_slice_is_told(run):
    for wanted, given in (
        ("TPU: a name for the slice", {}),
        ("ZONE: the zone, as us-east5-a", {"TPU": "one"}),
        ("TYPE: the slice, as v5p-64", TPU),
        ("RUNTIME: the image for it", TPU | {"TYPE": "v5p-64"}),
    ):
        assert run("experiments/launch/tpu_vm.sh", "create", status=1, **given) == []
        assert wanted in run.said


def test_slices_of_gke(run):
    asked = {"NAME": "one", "CLUSTER": "c", "ZONE": "z", "TYPE": "v5p-64", "STORAGE": "files"}
    xpk, pip, process = run("experiments/launch/xpk.sh", *ASKED, SLICES="2", **asked, **RUN)
    assert xpk[4:6] == ["workload", "create"]
    flags = dict(zip(xpk[6::2], xpk[7::2], strict=True))
    wanted = {"--workload": "one", "--cluster": "c", "--zone": "z", "--tpu-type": "v5p-64"}
    wanted |= {"--num-slices": "2", "--storage": "files", "--script-dir": str(ROOT)}
    assert wanted.items() < flags.items()
    assert pip[-1] == ".[tpu]" and process == trained("--join.auto", *ASKED)
    run("experiments/launch/xpk.sh", status=1, **{k: asked[k] for k in ("NAME", "CLUSTER")})
    assert "ZONE: its zone" in run.said


def test_nodes_of_skypilot(run):
    yaml = pytest.importorskip("yaml", reason="the file is YAML; nothing here needs a reader of it")
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task["envs"]) == {"LOG", "OUT", "NFS", "FLAGS"}
    node = RUN | {
        "FLAGS": "--architecture hstu",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    joined = ["--join.coordinator", "10.0.0.1:8476", "--join.count", "2", "--join.index", "1"]
    (process,) = run("-c", task["run"], **node)
    assert process == trained(*joined, "--architecture", "hstu")
    calls = run("-c", task["setup"], NFS="10.0.0.2:/files")
    assert calls[-1][0] == "uv" and calls[-1][-1] == f"{ROOT}[gpu]"


@pytest.mark.slow
def test_one_host_trains(tmp_path):
    log = tiny.log(tmp_path / "log")
    environment = os.environ | {
        "LOG": str(log),
        "OUT": str(tmp_path / "run"),
        "DEVICES": "2",
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("XLA_FLAGS", None)
    command = ("bash", LAUNCH / "one_host.sh", "--architecture", "dlrm_mlp")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
