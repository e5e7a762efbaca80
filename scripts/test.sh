#!/usr/bin/env bash
# Runs the project's tests: every registered CPU test, the main job on the target embedded among them, in four lanes where
# there are two cores. Arguments go to test/run_suite.py, e.g. scripts/test.sh --list
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$scripts/env.sh" python3 "$scripts/../test/run_suite.py" --hw cpu --suite stage-a-test-cpu --continue-on-error "$@"
