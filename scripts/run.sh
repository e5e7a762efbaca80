#!/usr/bin/env bash
# Runs the main job on the highest rung of the ladder that this machine can run; scripts/run.sh --help
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/env.sh" python3 -m pdkit.runner.run "$@"
