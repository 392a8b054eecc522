#!/usr/bin/env bash
# The README's first command in a virtual environment of its own: install, then the whole way on mnist5k.
# Usage: launch/quickstart.sh [workdir]
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=${1:-runs/mnist5k}

if [ ! -d .venv ]; then
  python3 -m venv .venv
fi
# shellcheck disable=SC1091
source .venv/bin/activate
pip install -e ".[demo]"
python -m cpnas_jax.main --config=configs/mnist5k.py --workdir="$workdir"
