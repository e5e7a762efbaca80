#!/usr/bin/env bash
# Runs the project's tests: every registered CPU test, the embedded rung of the main job among them. Half of their time is
# waiting for one core, so two halves run side by side; what the second printed follows the first.
# With arguments it is one run, and they go to test/run_suite.py, e.g. scripts/test.sh --list
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
suite=("$scripts/env.sh" python3 "$scripts/../test/run_suite.py" --hw cpu --suite stage-a-test-cpu --continue-on-error)
[[ $# == 0 ]] || exec "${suite[@]}" "$@"

"$scripts/env.sh" true
printed=$(mktemp)
trap 'rm -f "$printed"' EXIT
"${suite[@]}" --auto-partition-id 0 --auto-partition-size 2 & first=$!
"${suite[@]}" --auto-partition-id 1 --auto-partition-size 2 >"$printed" 2>&1 & second=$!
trap 'kill -TERM "$first" "$second" 2>/dev/null || true' INT TERM

# `wait` returns early when a trapped signal arrives: the halves are then told, and waited for again.
await() {
    local code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do code=0; wait "$1" || code=$?; done
    return "$code"
}
codes=(0 0)
await "$first" || codes[0]=$?
await "$second" || codes[1]=$?
cat "$printed"
exit $((codes[0] ? codes[0] : codes[1]))
