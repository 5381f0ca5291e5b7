#!/bin/bash
# The demo: a real model, the whole stack, one remote trace, and everything stopped again, also when it fails.
# Everything lies in .edif-hpc in this checkout; a second run reuses it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=$PWD/.venv/bin
home=$PWD/.edif-hpc
picture=$home/first_trace.png
export HF_HUB_CACHE=$home/hub HF_HUB_OFFLINE=1

"$bin/edif-hpc" models pull --demo --home "$home"

# A port nobody has, so that the demo runs beside whatever else does; the home keeps it until `down`.
port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
trap '"$bin/edif-hpc" down --home "$home"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$bin/edif-hpc" down --home "$home" > /dev/null 2>&1  # left by a run that was killed
"$bin/edif-hpc" up --detach --home "$home" --port "$port"

export NDIF_HOST=http://127.0.0.1:$port
# Without it nnsight would send a key that it saved for another service.
NDIF_API_KEY=$(< "$home/secrets/owner-key")
export NDIF_API_KEY
"$bin/python" examples/first_trace.py "$picture"
