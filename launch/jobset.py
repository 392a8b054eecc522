"""A run on a TPU slice of a GKE cluster, as a JobSet for kubectl.

python launch/jobset.py --name=NAME --image=IMAGE --accelerator=tpu-v4-podslice --topology=2x2x4 \
    --workdir=gs://... [--spot] -- FLAGS OF MAIN | kubectl apply -f -

Each machine of the slice is a pod that runs the same command. A pod that ends with 75, or is killed
or evicted, makes JobSet start all of them again, at most --restarts times; any other exit status
fails the JobSet at once.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

# 75: the same command resumes. The others are those of signals: SIGABRT of JAX when it misses
# another process, SIGKILL and SIGTERM of Kubernetes. Without a status, as on a lost machine, no
# rule applies, which restarts as well.
RESTARTED = [75, 134, 137, 143]


def hosts(topology: str, chips: int) -> int:
    """Return the machines of a slice with so many chips each."""
    return math.prod(map(int, topology.split("x"))) // chips


def literal(words: Sequence[str]) -> list[str]:
    """Return words in which Kubernetes replaces no $(NAME)."""
    return [word.replace("$", "$$") for word in words]


def manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the JobSet."""
    machines = hosts(arguments.topology, arguments.chips)
    workdir = f"--workdir={arguments.workdir}"
    selector = {
        "cloud.google.com/gke-tpu-accelerator": arguments.accelerator,
        "cloud.google.com/gke-tpu-topology": arguments.topology,
    }
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "main",
        "image": arguments.image,
        "command": ["python", "-m", "cpnas_jax.main", *literal([workdir])],
        "args": literal(arguments.flags),
        # A TPU that cannot be had is an error, no reason to compute on the CPU.
        "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}],
        "resources": {"limits": {"google.com/tpu": arguments.chips}},
    }
    pod = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "containers": [container],
    }
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    failure = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "main", "operator": "NotIn", "values": RESTARTED},
    }
    job = {
        "parallelism": machines,
        "completions": machines,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [failure]},
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {
        "name": arguments.name,
        # All pods on one slice.
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    if arguments.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": arguments.queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": arguments.restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see launch/jobset.py --help\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a mistake exits with status 2."""
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="built from launch/Dockerfile")
    parser.add_argument("--accelerator", required=True, help="such as tpu-v4-podslice")
    parser.add_argument("--topology", required=True, help="of the slice, such as 2x2x4")
    parser.add_argument("--chips", type=int, default=4, help="of one machine, 4 by default")
    parser.add_argument("--workdir", required=True, help="gs://...")
    parser.add_argument("--spot", action="store_true", help="on machines that may be preempted")
    parser.add_argument("--restarts", type=int, default=20, help="at most, 20 by default")
    parser.add_argument("--service-account", default="", help="of Kubernetes, that may write there")
    parser.add_argument("--queue", default="", help="LocalQueue, where the cluster has Kueue")
    parser.add_argument("flags", nargs="*", help="of cpnas_jax.main, behind --")
    read = parser.parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", read.topology):
        parser.error(f"--topology={read.topology} is not like 4x4 or 2x2x4")
    if read.chips < 1 or math.prod(map(int, read.topology.split("x"))) % read.chips:
        parser.error(f"--topology={read.topology} has no multiple of --chips={read.chips}")
    if not read.workdir.startswith("gs://"):
        parser.error(f"--workdir={read.workdir}: a pod keeps no files; give gs://...")
    if not read.flags:
        parser.error("the flags of main are missing behind --")
    if any(flag.split("=")[0] == "--workdir" for flag in read.flags):
        parser.error("--workdir stands before --, not among the flags of main")
    return read


if __name__ == "__main__":
    print(json.dumps(manifest(parse(sys.argv[1:])), indent=2))
