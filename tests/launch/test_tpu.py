"""launch/tpu.sh against a stand-in gcloud: exact calls, quoting, failures, preemption."""

import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
POD = ["--name=pod", "--project=my project", "--zone=us-central2-b"]
TYPE = "--type=v4-32"
WORKDIR = "--workdir=gs://bucket/run 1"
NO_WAITING = ["--poll=0", "--grace=0"]
AWKWARD = [
    "--config=configs/cifar10.py:search,smoke",
    "--config.search.reductions=(1, 3)",
    """--config.genotype=it's "$HOME" `x`\\ & *;\ttab""",
    "--config.dataset.name=",
]
NOT_FOUND = "1 ERROR: (gcloud...) NOT_FOUND: Resource was not found."
PLACE = ["--project=my project", "--zone=us-central2-b"]
SSH = ["--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=15"]


def ssh(command, worker="all"):
    return [
        *["compute", "tpus", "tpu-vm", "ssh", "pod", *PLACE, "--quiet"],
        *[f"--worker={worker}", *SSH, f"--command={command}"],
    ]


def create(*flags):
    return [
        *["compute", "tpus", "queued-resources", "create", "pod", *PLACE, "--quiet"],
        *["--node-id=pod", "--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base"],
        *["--valid-until-duration=120m", *flags],
    ]


QUEUED = [
    *["compute", "tpus", "queued-resources", "describe", "pod", *PLACE],
    "--format=value(state.state)",
]
NODE = ["compute", "tpus", "tpu-vm", "describe", "pod", *PLACE, "--format=value(state)"]
DELETE = [
    *["compute", "tpus", "queued-resources", "delete", "pod", *PLACE, "--force", "--quiet"],
]


def start_command(cloud):
    (call,) = [call for call in cloud.calls() if "tpu_worker.sh start" in call[-1]]
    return shlex.split(call[-1].removeprefix("--command="))


def see_through(cloud, *flags, main=("--config=configs/cifar10.py:search",)):
    return cloud.tpu("resume", *POD, TYPE, WORKDIR, *NO_WAITING, *flags, "--", *main)


def test_create_waits_until_the_node_is_ready(cloud):
    cloud.answers("queued-resources describe", "0 ACCEPTED", "0 PROVISIONING", "0 ACTIVE")
    cloud.answers("tpu-vm describe", "0 CREATING", "0 READY")
    done = cloud.tpu("create", *POD, TYPE, *NO_WAITING, "--spot", "--create-flag=--network=a b")
    assert done.returncode == 0, done.stderr
    expected = [QUEUED, QUEUED, QUEUED, NODE, QUEUED, NODE]
    assert cloud.calls() == [create("--spot", "--network=a b"), *expected]
    for state in ("WAITING ACCEPTED", "WAITING PROVISIONING", "WAITING CREATING", "READY"):
        assert f"pod: {state}\n" in done.stderr


def test_a_refused_request_passes_on(cloud):
    cloud.answers("queued-resources create", "1 ERROR: quota exceeded")
    done = cloud.tpu("create", *POD, TYPE)
    assert done.returncode == 1
    assert "quota exceeded" in done.stderr
    assert cloud.calls() == [create()]


@pytest.mark.parametrize(
    ("state", "status", "message"),
    [
        ("FAILED", 1, "the request failed"),
        ("SUSPENDED", 75, "was taken away before"),
    ],
)
def test_create_ends_with_a_request_that_will_not_come(cloud, state, status, message):
    cloud.answers("queued-resources describe", "0 ACCEPTED", f"0 {state}")
    done = cloud.tpu("create", *POD, TYPE, *NO_WAITING)
    assert done.returncode == status
    assert message in done.stderr


def test_waiting_is_bounded(cloud):
    cloud.answers("queued-resources describe", "0 ACCEPTED")
    script = (ROOT / "launch" / "tpu_functions.sh").read_text()
    assert script.count("60 * wait + 300") == 1
    # The same functions with the service's own time taken out.
    directory = cloud.directory / "short" / "launch"
    directory.mkdir(parents=True)
    (directory / "tpu_functions.sh").write_text(script.replace("60 * wait + 300", "wait"))
    (directory / "tpu.sh").write_text((ROOT / "launch" / "tpu.sh").read_text())
    done = subprocess.run(
        ["bash", directory / "tpu.sh", "create", *POD, TYPE, "--wait=1", "--poll=0"],
        env=cloud.environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert "launch/tpu.sh delete withdraws the request" in done.stderr


def test_set_up_copies_one_commit_and_installs_it_everywhere(cloud):
    done = cloud.tpu("setup", *POD, "--data=gs://bucket/my data")
    assert done.returncode == 0, done.stderr
    copy, install = cloud.calls()
    assert copy == [
        *["compute", "tpus", "tpu-vm", "scp", f"{cloud.directory}/cpnas_jax-pod.tar.gz"],
        *[str(ROOT / "launch" / "tpu_worker.sh"), "pod:", *PLACE, "--quiet", "--worker=all"],
    ]
    assert install == ssh("bash tpu_worker.sh setup cpnas_jax-pod.tar.gz 'gs://bucket/my data'")
    assert not (cloud.directory / "cpnas_jax-pod.tar.gz").exists()


@pytest.mark.parametrize(("kind", "calls"), [("tpu-vm scp", 1), ("setup", 2)])
def test_a_set_up_that_fails_on_a_worker_fails(cloud, kind, calls):
    cloud.answers(kind, "7 worker 3: no space left")
    done = cloud.tpu("setup", *POD)
    assert done.returncode == 7
    assert "no space left" in done.stderr
    assert len(cloud.calls()) == calls
    assert not (cloud.directory / "cpnas_jax-pod.tar.gz").exists()


def test_run_hands_every_flag_on_as_it_is(cloud):
    done = cloud.tpu("run", *POD, WORKDIR, "--", *AWKWARD)
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls()
    assert call[:-1] == ssh("")[:-1]
    words = ["bash", "tpu_worker.sh", "start", WORKDIR, *AWKWARD]
    # As Python and as the worker's shell read it.
    assert start_command(cloud) == words
    said = subprocess.run(
        ["bash", "-c", call[-1].removeprefix("--command=").replace("bash", "printf '%s\\0'", 1)],
        capture_output=True,
        text=True,
    )
    assert said.stdout.split("\0")[:-1] == words[1:]


def test_a_run_that_cannot_start_passes_its_status_on(cloud):
    cloud.answers("start", "3 tpu_worker.sh: host-1: a run is active here")
    done = cloud.tpu("run", *POD, WORKDIR, "--", "--config=x")
    assert done.returncode == 3
    assert "a run is active here" in done.stderr


def test_the_small_verbs(cloud):
    cloud.tpu("logs", *POD, "--worker=3")
    cloud.tpu("stop", *POD, "--grace=60")
    assert cloud.calls() == [
        ssh("tail -n 100 -F cpnas_run/log", worker=3),
        ssh("bash tpu_worker.sh stop TERM 60"),
    ]
    done = cloud.tpu("status", *POD)
    assert done.stdout.splitlines() == [
        "pod: READY",
        "cpnas-worker host-0 ended 0",
        "cpnas-worker host-1 ended 0",
    ]


def test_delete_sees_that_nothing_is_left(cloud):
    cloud.answers("queued-resources describe", NOT_FOUND)
    assert cloud.tpu("delete", *POD).returncode == 0
    assert cloud.calls() == [DELETE, QUEUED]
    cloud.forget()
    cloud.answers("queued-resources describe", "0 ACTIVE")
    done = cloud.tpu("delete", *POD)
    assert done.returncode == 1
    assert "may still be billed" in done.stderr


def test_a_node_without_a_queued_resource_is_deleted_too(cloud):
    cloud.answers("queued-resources delete", NOT_FOUND)
    cloud.answers("queued-resources describe", NOT_FOUND)
    assert cloud.tpu("delete", *POD).returncode == 0
    node = ["compute", "tpus", "tpu-vm", "delete", "pod", *PLACE, "--quiet"]
    assert cloud.calls() == [DELETE, node, QUEUED]


def test_flags_have_defaults_in_the_environment(cloud):
    variables = {
        "CPNAS_NAME": "pod",
        "CPNAS_PROJECT": "my project",
        "CPNAS_ZONE": "us-central2-b",
        "CPNAS_TYPE": "v4-32",
        "CPNAS_WORKDIR": "gs://bucket/other",
    }
    assert cloud.tpu("run", "--", "--config=x", **variables).returncode == 0
    assert start_command(cloud)[3:] == ["--workdir=gs://bucket/other", "--config=x"]
    cloud.forget()
    assert cloud.tpu("run", WORKDIR, "--", "--config=x", **variables).returncode == 0
    assert start_command(cloud)[3:] == [WORKDIR, "--config=x"]


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_fits_the_type(cloud, kind, version):
    cloud.tpu("create", *POD, f"--type={kind}")
    assert f"--runtime-version={version}" in cloud.calls()[0]
    cloud.forget()
    cloud.tpu("create", *POD, f"--type={kind}", "--version=mine")
    assert "--runtime-version=mine" in cloud.calls()[0]


RUN = ["run", *POD, WORKDIR]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a verb is missing"),
        (["begin"], "there is no verb begin"),
        (["status"], "status needs --name=..., such as --name=pod (or CPNAS_NAME in the"),
        (["status", "--name=a", "--zone=b"], "status needs --project=..."),
        (["create", *POD], "create needs --type=..., such as --type=v4-32 (or CPNAS_TYPE"),
        (["create", *POD, "--type=v9-8"], "--version=... is needed for --type=v9-8"),
        (
            ["create", *POD, TYPE, "--spot", "--reserved"],
            "--spot and --reserved exclude",
        ),
        (["create", *POD, TYPE, "--wait=long"], "--wait=long is no whole number"),
        (["status", *POD, "--name=a b"], "--name=a b: lower-case letters, digits and hyphens"),
        (["status", *POD, "--zone", "b"], "unexpected --zone; flags are --FLAG=VALUE"),
        (["status", *POD, "--", "--config=x"], "status takes no flags of main"),
        (["setup", *POD, "--ref=nothing"], "--ref=nothing is no commit of"),
        (["setup", *POD, "--data=/data"], "--data=/data is no gs://... directory"),
        (["run", *POD, "--", "--config=x"], "run needs --workdir=..., such as --workdir=gs://"),
        (RUN, "run needs the flags of main behind --"),
        ([*RUN, "--", "--workdir=x"], "--workdir stands before --"),
        (
            ["run", *POD, TYPE, "--workdir=runs/x", "--", "--config=x"],
            "--workdir=runs/x is not shared by the workers of v4-32; give gs://...",
        ),
        (["run", *POD, "--workdir=runs/x", "--", "--config=x"], "run needs --type=..."),
        (
            ["resume", *POD, "--type=v4-8", "--workdir=runs/x", "--", "--config=x"],
            "--workdir=runs/x: resume needs gs://..., which outlives a pod",
        ),
    ],
)
def test_wrong_usage_is_one_line(cloud, arguments, message):
    done = cloud.tpu(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_one_worker_may_keep_its_own_workdir(cloud):
    assert cloud.tpu("run", *POD, "--type=v4-8", "--workdir=runs/x", "--", "-x").returncode == 0


def test_resume_goes_the_whole_way_from_nothing(cloud):
    cloud.answers("queued-resources describe", NOT_FOUND, "0 ACTIVE", NOT_FOUND)
    cloud.answers("status", "0 cpnas-worker a running", "0 cpnas-worker a ended 0")
    done = see_through(cloud, "--delete")
    assert done.returncode == 0, done.stderr
    assert cloud.kinds() == [
        *["describe", "create", "describe", "node", "scp", "setup", "start"],
        *["status", "status", "delete", "describe"],
    ]


def test_resume_takes_up_what_is_there(cloud):
    cloud.answers("status", "0 cpnas-worker a running", "0 cpnas-worker a ended 0")
    assert see_through(cloud).returncode == 0
    assert cloud.kinds() == ["describe", "node", "status", "status"]


@pytest.mark.parametrize("answer", ["127 no such file", "0 cpnas-worker a bare"])
def test_resume_sets_up_what_is_bare(cloud, answer):
    cloud.answers("status", answer, "0 cpnas-worker a ended 0")
    assert see_through(cloud).returncode == 0
    assert cloud.kinds()[2:] == ["status", "scp", "setup", "start", "status"]


def test_a_preempted_pod_is_made_again_and_the_same_command_run(cloud):
    cloud.answers(
        "queued-resources describe",
        *["0 ACTIVE", "0 SUSPENDED", "0 SUSPENDED", NOT_FOUND, "0 ACCEPTED", "0 ACTIVE"],
    )
    cloud.answers(
        "status",
        "0 cpnas-worker a ended 0",
        "0 cpnas-worker a running",
        "255 ssh: connect to host: timed out",
        "0 cpnas-worker a running",
        "0 cpnas-worker a ended 0",
    )
    done = see_through(cloud, "--spot", main=AWKWARD)
    assert done.returncode == 0, done.stderr
    assert cloud.kinds() == [
        *["describe", "node", "status", "start", "status", "status", "describe"],
        *["describe", "delete", "describe", "create", "describe", "describe", "node"],
        *["scp", "setup", "start", "status", "status"],
    ]
    calls = cloud.calls()
    starts = [call for call in calls if "tpu_worker.sh start" in call[-1]]
    assert starts[0] == starts[1]
    assert create("--spot") in calls
    assert "attempt 2 of 20: the same command again" in done.stderr


@pytest.mark.parametrize("node", ["0 PREEMPTED", "0 TERMINATED", NOT_FOUND])
def test_a_lost_node_is_seen_before_its_queued_resource_knows(cloud, node):
    cloud.answers("tpu-vm describe", node)
    cloud.answers("queued-resources describe", "0 ACTIVE", NOT_FOUND)
    cloud.answers("queued-resources create", "9 enough")
    assert see_through(cloud).returncode == 1
    assert cloud.kinds()[:5] == ["describe", "node", "delete", "describe", "create"]


def test_a_pod_that_is_lost_while_it_is_set_up_is_made_again(cloud):
    cloud.answers(
        "queued-resources describe",
        *[NOT_FOUND, "0 ACTIVE", "0 SUSPENDING", "0 SUSPENDED", NOT_FOUND, "0 ACTIVE"],
    )
    cloud.answers("setup", "255 connection closed", "0 ")
    done = see_through(cloud)
    assert done.returncode == 0, done.stderr
    assert cloud.kinds().count("create") == 2


def test_a_worker_out_of_reach_is_given_time_to_be_known_as_lost(cloud):
    cloud.answers("status", "0 cpnas-worker a idle", "0 cpnas-worker a ended 0")
    cloud.answers("start", "255 connection closed", "0 ")
    cloud.answers(
        "queued-resources describe",
        *["0 ACTIVE", "0 ACTIVE", "0 ACTIVE", "0 SUSPENDED", "0 SUSPENDED", NOT_FOUND, "0 ACTIVE"],
    )
    assert see_through(cloud).returncode == 0
    assert cloud.kinds().count("create") == 1


@pytest.mark.parametrize(
    "answer",
    [
        "0 cpnas-worker a ended 75\ncpnas-worker b ended 75",
        "0 cpnas-worker a ended 1\ncpnas-worker b ended 75",
        "0 cpnas-worker a ended 1\ncpnas-worker b vanished",
        "0 cpnas-worker a idle\ncpnas-worker b ended 134",
        # JAX misses another process
        "0 cpnas-worker a ended 134\ncpnas-worker b ended 134",
    ],
)
def test_a_stopped_run_goes_on_on_the_same_pod(cloud, answer):
    answer = answer.replace("\n", "\\n")
    cloud.answers("status", "0 cpnas-worker a idle", answer, answer, "0 cpnas-worker a ended 0")
    done = see_through(cloud)
    assert done.returncode == 0, done.stderr
    assert cloud.kinds().count("start") == 2
    assert cloud.kinds().count("create") == 0


def test_attempts_are_counted(cloud):
    cloud.answers("status", "0 cpnas-worker a ended 75")
    done = see_through(cloud, "--attempts=3")
    assert done.returncode == 75
    assert cloud.kinds().count("start") == 3
    assert "stopped at attempt 3 of --attempts=3; the same command resumes" in done.stderr


def test_another_status_is_passed_on_with_the_end_of_the_log(cloud):
    cloud.answers(
        "status",
        "0 cpnas-worker a idle",
        "0 cpnas-worker b ended 3\\ncpnas-worker a ended 134\\ncpnas-worker c ended 4",
    )
    cloud.answers("log", "0 error: no such data set")
    done = see_through(cloud)
    assert done.returncode == 3
    assert "failed with status 3 on b" in done.stderr
    assert "error: no such data set" in done.stderr
    assert cloud.kinds().count("start") == 1
    assert "until launch/tpu.sh delete, and billed" in done.stderr


def test_a_failed_run_deletes_its_pod_where_asked(cloud):
    cloud.answers("status", "0 cpnas-worker a idle", "0 cpnas-worker a ended 1")
    cloud.answers("queued-resources describe", "0 ACTIVE", NOT_FOUND)
    assert see_through(cloud, "--delete").returncode == 1
    assert cloud.kinds()[-2:] == ["delete", "describe"]


def test_workers_that_wait_for_a_failed_one_are_ended(cloud):
    cloud.answers(
        "status",
        "0 cpnas-worker a idle",
        "0 cpnas-worker a running\\ncpnas-worker b ended 5",
        "0 cpnas-worker a ended 137\\ncpnas-worker b ended 5",
    )
    done = see_through(cloud)
    assert "bash tpu_worker.sh stop KILL 60" in done.stderr
    assert cloud.kinds()[3:] == ["start", "status", "stop", "status", "log"]
    assert done.returncode == 5


@pytest.mark.parametrize("node", ["1 ERROR: timed out", "0 PAUSED", "0 "])
def test_a_node_whose_state_is_not_understood_is_left_alone(cloud, node):
    cloud.answers("tpu-vm describe", node)
    assert see_through(cloud).returncode == 1
    assert not {"delete", "create", "start"} & set(cloud.kinds())


@pytest.mark.parametrize("state", [NOT_FOUND, "0 DELETING"])
def test_a_pod_that_was_deleted_is_not_made_again(cloud, state):
    cloud.answers("status", "0 cpnas-worker a running", "255 timed out")
    cloud.answers("queued-resources describe", "0 ACTIVE", state)
    done = see_through(cloud)
    assert done.returncode == 1
    assert "pod was deleted; the same command makes it again and resumes" in done.stderr
    assert "create" not in cloud.kinds()


def test_gcloud_without_an_answer_deletes_nothing(cloud):
    cloud.answers("queued-resources describe", "1 ERROR: reauthentication needed")
    done = see_through(cloud)
    assert done.returncode == 1
    assert "reauthentication needed" in done.stderr
    assert set(cloud.kinds()) == {"describe", "log"}


@pytest.mark.parametrize(
    ("verb", "answers"),
    [
        (["create", *POD, TYPE, "--spot"], {}),
        (["setup", *POD, "--data=gs://b/it's"], {}),
        (["run", *POD, WORKDIR, "--", *AWKWARD], {}),
        (["logs", *POD], {}),
        (["status", *POD], {}),
        (["stop", *POD], {}),
        (["delete", *POD], {"queued-resources describe": [NOT_FOUND]}),
        (
            ["resume", *POD, TYPE, WORKDIR, *NO_WAITING, "--delete", "--", *AWKWARD],
            {"queued-resources describe": [NOT_FOUND, "0 ACTIVE", NOT_FOUND]},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_dry_run_prints_what_a_run_without_incidents_does(cloud, verb, answers):
    printed = cloud.tpu(verb[0], "--dry-run", *verb[1:])
    assert printed.returncode == 0, printed.stderr
    assert cloud.calls() == []
    done = subprocess.run(
        ["bash"], input=printed.stdout, env=cloud.environment, capture_output=True, text=True
    )
    pasted = cloud.calls()
    assert pasted, done.stderr
    cloud.forget()
    for kind, lines in answers.items():
        cloud.answers(kind, *lines)
    assert cloud.tpu(*verb).returncode == 0
    assert cloud.calls() == pasted
