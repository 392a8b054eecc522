"""launch/jobset.py: the manifest of a slice, and mistakes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

NEEDED = {
    "--name": "search",
    "--image": "registry/cpnas_jax",
    "--accelerator": "tpu-v4-podslice",
    "--topology": "2x2x4",
    "--workdir": "gs://bucket/run",
}
FLAGS = ["--config=configs/cifar10.py", "--config.search.reductions=(1, 3)", "--it's=$(HOME) $x"]


def jobset(*arguments, flags=FLAGS, **changed):
    given = {**NEEDED, **{f"--{name}": value for name, value in changed.items()}}
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "jobset.py", *words, *arguments, "--", *flags],
        capture_output=True,
        text=True,
    )


def job_of(done):
    assert done.returncode == 0, done.stderr
    (replicated,) = json.loads(done.stdout)["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.mark.parametrize(
    ("topology", "chips", "machines"), [("2x2x4", 4, 4), ("2x2x1", 4, 1), ("2x4", 8, 1)]
)
def test_every_machine_of_the_slice_runs_the_same_command(topology, chips, machines):
    job = job_of(jobset(topology=topology, chips=chips))
    assert job["parallelism"] == job["completions"] == machines
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["command"] == ["python", "-m", "cpnas_jax.main", "--workdir=gs://bucket/run"]
    assert container["args"] == [*FLAGS[:2], "--it's=$$(HOME) $$x"]


def test_only_what_resumes_is_started_again():
    done = jobset("--restarts=7")
    job = job_of(done)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert 75 in rule["onExitCodes"]["values"]
    assert not {0, 1, 2} & set(rule["onExitCodes"]["values"])
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert json.loads(done.stdout)["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }


def test_what_may_be_left_out():
    plain = jobset()
    assert "spot" not in plain.stdout
    full = jobset("--spot", "--service-account=writer", "--queue=tpus")
    pod = job_of(full)["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "writer"
    labels = json.loads(full.stdout)["metadata"]["labels"]
    assert labels == {"kueue.x-k8s.io/queue-name": "tpus"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": None}, "the following arguments are required: --name"),
        ({"topology": "16"}, "--topology=16 is not like 4x4 or 2x2x4"),
        ({"topology": "3x3"}, "--topology=3x3 has no multiple of --chips=4"),
        ({"workdir": "runs/x"}, "--workdir=runs/x: a pod keeps no files; give gs://..."),
        ({"flags": []}, "the flags of main are missing behind --"),
        ({"flags": ["--workdir=x"]}, "--workdir stands before --"),
    ],
)
def test_wrong_usage_is_one_line(changed, message):
    done = jobset(**changed)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
