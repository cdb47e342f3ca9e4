"""Files for clusters: valid for those who read them, the run in them as it was asked for; and the dry run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from mmscale_launcher.emit import KINDS, emit, plan
from ray.autoscaler._private.util import prepare_config, validate_config

from mmscale.cli import main
from mmscale.config import Config, load_config
from mmscale.recipes import get

CHANGES = ["run.device=cpu", "data.batch_size=96", "run.name=Big_run.2", "data.train=shards of all/x"]
CPU = get("quickstart").override(*CHANGES, "launch.nodes=3", "launch.workers_per_node=2")
GPU = CPU.override("run.device=cuda", "launch.workers_per_node=null", "launch.min_workers=9")


def emitted(kind: str, config: Config = CPU) -> str:
    changes = [*CHANGES, f"run.device={config.run.device}"] if config is GPU else CHANGES
    return emit(kind, recipe="quickstart", overrides=changes, config=config)


def launched(command: str, tmp_path: Path) -> Config:
    """The config that `mmscale launch` in a command makes, as the command line takes it."""
    words = shlex.split(command)
    begin = words.index("launch")
    out = tmp_path / "config.json"
    arguments = words[begin + 1 :]
    if "&&" in arguments:
        arguments = arguments[: arguments.index("&&")]
    from mmscale import cli

    namespace = cli._parse(["launch", *arguments])
    out.write_text(cli._launch_config(namespace).to_json())
    return load_config(out)


def check_launched(config: Config, wanted: Config, folder: str) -> None:
    differences = wanted.differences(config)
    assert [text.split(":")[0] for text in differences if not text.startswith("launch.workers")] == [
        "run.dir",
        "train.save_clock",
    ]
    assert config.run.dir == folder
    assert config.train.save_clock == "10m"


# ---------------------------------------------------------------------------------------------- a Ray cluster


@pytest.mark.parametrize("config", [CPU, GPU, CPU.override("launch.nodes=1")])
def test_a_ray_cluster_is_valid(config: Config) -> None:
    cluster = yaml.safe_load(emitted("ray-cluster", config))
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    validate_config(prepare_config(cluster))  # what `ray up` does with it first
    assert len(cluster["provider"]["worker_ips"]) == config.launch.nodes - 1
    assert all("ulimit" in line or "ray stop" in line for line in cluster["head_start_ray_commands"])


def test_a_ray_cluster_is_told_what_to_run(tmp_path: Path) -> None:
    (line,) = (
        line for line in emitted("ray-cluster").splitlines() if "ray exec" in line and "--tmux" in line
    )
    words = shlex.split(line.removeprefix("#"))
    assert words[:4] == ["ray", "exec", "cluster.yaml", "--tmux"]
    check_launched(launched(words[4], tmp_path), CPU, "/shared/mmscale/runs/Big_run.2")


# -------------------------------------------------------------------------------------------------- Kubernetes

# Written for this test after KubeRay's API reference (v1): the fields that a file of ours may use, their types, and
# which of them are required. A pod's own fields are checked as far as we use them.
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "terminationGracePeriodSeconds": {"type": "integer"},
                "tolerations": {
                    "type": "array",
                    "items": {"type": "object", "required": ["key", "operator"]},
                },
                "affinity": {"type": "object"},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image", "resources"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                            "image": {"type": "string"},
                            "env": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["name", "value"],
                                    "additionalProperties": {"type": "string"},
                                },
                            },
                            "ports": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["containerPort"],
                                    "properties": {
                                        "containerPort": {"type": "integer"},
                                        "name": {"type": "string", "maxLength": 15},
                                    },
                                },
                            },
                            "resources": {
                                "type": "object",
                                "required": ["requests", "limits"],
                                "additionalProperties": {
                                    "type": "object",
                                    "additionalProperties": {"type": ["string", "integer"]},
                                },
                            },
                            "volumeMounts": {
                                "type": "array",
                                "items": {"type": "object", "required": ["name", "mountPath"]},
                            },
                        },
                    },
                },
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            },
        }
    },
}
START = {"type": "object", "additionalProperties": {"type": "string"}}
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            # its pods get names made of it, and a label holds 63 characters
            "properties": {"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,46}[a-z0-9])?$"}},
        },
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "backoffLimit": {"type": "integer"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["rayStartParams", "template"],
                            "additionalProperties": False,
                            "properties": {"rayStartParams": START, "template": POD},
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": [
                                    "groupName",
                                    "minReplicas",
                                    "maxReplicas",
                                    "rayStartParams",
                                    "template",
                                ],
                                "additionalProperties": False,
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": {"type": "integer"},
                                    "minReplicas": {"type": "integer"},
                                    "maxReplicas": {"type": "integer"},
                                    "rayStartParams": START,
                                    "template": POD,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize("config", [CPU, GPU])
def test_a_ray_job_is_valid(config: Config, tmp_path: Path) -> None:
    job = yaml.safe_load(emitted("kuberay", config))
    jsonschema.validate(job, RAY_JOB)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 3
    for template in (group["template"], job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]):
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["image"].startswith("registry.example/mmscale:")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (8 if config is GPU else None)
    # the launcher asks a node for a CPU a worker
    assert int(group["rayStartParams"]["num-cpus"]) >= (8 if config is GPU else 2)
    check_launched(launched(job["spec"]["entrypoint"], tmp_path), config, "/shared/mmscale/runs/Big_run.2")


# ------------------------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize("config", [CPU, GPU, CPU.override("launch.nodes=1")])
def test_a_slurm_script_is_clean(config: Config, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(emitted("slurm", config))
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""
    shellcheck = shutil.which("shellcheck", path=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "it comes with the test extra"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


FAKES = {
    "scontrol": 'case $1 in show) printf "a\\nb\\nc\\n";; *) echo "$*" >> scontrol.log;; esac',
    # runs its command here, as it would there
    "srun": "while [[ $1 == --* ]]; do shift; done; "
    'if [[ $1 == hostname ]]; then echo 10.0.0.1 10.0.0.2; else exec "$@"; fi',
    "ray": 'echo "$*" >> ray.log; exec sleep 60',
    "python": "wc -l < ray.log",  # how many nodes there are, which the script asks Ray in Python
    "mmscale": 'printf "%s\\n" "$@" > mmscale.log; trap "kill %1; sleep 0.3; exit 75" TERM; '
    "[ -z ${AT_ONCE:-} ] || exit $AT_ONCE; touch started; sleep 60 & wait",
}


def slurm_job(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The script in an allocation of three nodes, whose commands are shell scripts."""
    (folder / "bin").mkdir()
    for name, text in FAKES.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (folder / "job.sh").write_text(emitted("slurm").replace("sleep 5\n", "sleep 0.1\n"))
    return subprocess.Popen(
        ["bash", "job.sh"],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "MMSCALE_VENV": str(folder),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "[a-c]",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def appears(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_slurm_job_that_is_told_to_stop_saves_and_comes_back(tmp_path: Path) -> None:
    job = slurm_job(tmp_path)
    appears(tmp_path / "started", job)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
    output, _ = job.communicate(timeout=10)
    assert job.returncode == 75, output
    assert (tmp_path / "scontrol.log").read_text() == "requeue 1234567\n"
    starts = (tmp_path / "ray.log").read_text().splitlines()
    assert len(starts) == 3
    port = 20000 + 1234567 % 20000
    assert sum(f"--head --node-ip-address=10.0.0.1 --port={port}" in line for line in starts) == 1
    assert sum(f"--address=10.0.0.1:{port}" in line for line in starts) == 2
    words = (tmp_path / "mmscale.log").read_text().splitlines()
    assert words[-2:] == ["--address", f"10.0.0.1:{port}"]
    check_launched(launched(shlex.join(words), tmp_path), CPU, "runs/Big_run.2")
    with pytest.raises(ProcessLookupError):  # nothing of it is left
        os.killpg(job.pid, 0)


@pytest.mark.parametrize(("code", "stop_file"), [("0", False), ("10", False), ("75", True)])
def test_a_slurm_job_that_has_ended_stays_so(tmp_path: Path, code: str, stop_file: bool) -> None:
    """Done, failed for good, or stopped by `mmscale stop`, which leaves its file there."""
    if stop_file:
        (tmp_path / "runs/Big_run.2").mkdir(parents=True)
        (tmp_path / "runs/Big_run.2/stop").touch()
    job = slurm_job(tmp_path, AT_ONCE=code)
    output, _ = job.communicate(timeout=10)
    assert job.returncode == int(code), output
    assert not (tmp_path / "scontrol.log").exists()


# -------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("kind", KINDS)
def test_emit_writes_to_stdout(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--nodes", "3", "--workers-per-node", "2", "--emit", kind]
    assert main(["launch", "quickstart", *CHANGES, *arguments]) == 0
    assert capsys.readouterr().out == emitted(kind)


def test_a_dry_run_says_what_would_start(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["--nodes", 3, "--workers-per-node", 2, "--min-workers", 4, "--address", "auto"]
    assert main(["launch", "quickstart", *CHANGES, *map(str, arguments), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "on            Ray at auto" in lines
    assert "  node 2      ranks 4 to 5" in lines
    assert "batch         96 = 6 ranks x 1 x 16 samples" in lines
    assert "goes on with  4 ranks or more, when nodes are lost" in lines


def test_a_dry_run_finds_a_batch_that_does_not_fit() -> None:
    text = plan(CPU.override("launch.workers_per_node=5"), address=None)
    assert "batch         96: 15 ranks x accumulation 1 don't divide it" in text
