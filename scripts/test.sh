#!/usr/bin/env bash
# Runs the project's tests: every registered CPU test, the embedded rung of the main job among them. Half of their time is
# waiting for one core, so two halves run side by side; what the second printed follows the first.
# With arguments it is one run, and they go to test/run_suite.py, e.g. scripts/test.sh --list
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
runner=$scripts/halves.py
[[ $# == 0 ]] || runner=$scripts/../test/run_suite.py
exec "$scripts/env.sh" python3 "$runner" --hw cpu --suite stage-a-test-cpu --continue-on-error "$@"
