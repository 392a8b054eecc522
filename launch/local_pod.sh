#!/usr/bin/env bash
# A pod of N processes with D devices each on this machine; see launch/local_pod.py.
# Usage: launch/local_pod.sh N D [flags of cpnas_jax.main]
exec python3 "$(dirname "$0")/local_pod.py" "$@"
