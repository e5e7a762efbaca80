#!/usr/bin/env bash
# Runs the main job on the highest target that this machine can run; scripts/run.sh --help
exec "$(dirname "${BASH_SOURCE[0]}")/env.sh" python3 -m pdkit run "$@"
