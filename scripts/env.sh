#!/usr/bin/env bash
# Makes the pinned environment of the suite, once per lock file and user, and runs a command in it.
#
#   scripts/env.sh                 make it, print its path
#   scripts/env.sh CMD [ARG...]    the same, then run CMD with its python3 first on PATH and this clone's pdkit importable
#
# PDKIT_CACHE_DIR   where environments are kept (default ${XDG_CACHE_HOME:-~/.cache}/sglang-pd-suite)
# PDKIT_GPU         1 or 0: with what only GPUs need, or only machines without (default: 1 where there is an NVIDIA driver)
# PDKIT_PYTHON      use this interpreter as it is (SGLang's own container, another release): nothing is installed
set -euo pipefail
shopt -s inherit_errexit

readonly UV_VERSION=0.13.9
readonly NOT_READY=3
readonly IMPORTED="sglang.test.run_eval, sglang.test.server_fixtures.disaggregation_fixture, sglang_router.launch_router,\
 transformers.models.deepseek_v4.modeling_deepseek_v4, uvicorn, openai, scipy.stats, jinja2, junitparser, rich.live"

say() { printf 'environment: %s\n' "$*" >&2; }
fail() { say "$*"; exit "$NOT_READY"; }
trap 'exit 130' INT

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
locks=("$repo/requirements.lock" "$repo/requirements-dev.lock")

# What `--version` prints, of a supported one.
version_of() {
    "$1" -ISc 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit(1); print("Python", sys.version.split()[0])' 2>/dev/null
}

base_python() {
    local candidate version
    for candidate in python3 python3.11 python3.12 python3.13; do
        if version=$(version_of "$candidate"); then echo "$candidate $version"; return; fi
    done
    fail "needs Python 3.11, 3.12 or 3.13, found $(python3 --version 2>&1 || true); install one, or set PDKIT_PYTHON"
}

has_gpu() {
    case ${PDKIT_GPU:-} in
        0) return 1 ;;
        1) return 0 ;;
        "") [[ -e /dev/nvidiactl ]] ;;
        *) fail "PDKIT_GPU=$PDKIT_GPU: expected 1 or 0" ;;
    esac
}

make_venv() {
    local python=$1 venv=$2 started=$SECONDS
    say "making $venv (about 10 GB; a few minutes, once)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian: apt-get install python3-venv"
    "$venv/bin/python" -m pip install --quiet "uv==$UV_VERSION" \
        || fail "pip could not install uv==$UV_VERSION; is a Python package index reachable?"
    UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180} \
        "$venv/bin/uv" pip install --python "$venv/bin/python" "${locks[@]/#/--requirement=}" 2>&1 | { grep --line-buffered -v '^ [+-] ' || true; } \
        || fail "uv could not install ${locks[*]} (reason above; free disk: $(df -Ph "$venv" | awk 'NR==2 {print $4}')); run again to retry"
    say "checking that SGLang imports"
    # uv compiles nothing, and who sets PYTHONDONTWRITEBYTECODE would compile it all in each process: twice the time.
    env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c "import $IMPORTED" \
        || fail "installed, but SGLang does not import (reason above)"
    touch "$venv/.complete"
    say "ready after $((SECONDS - started)) s"
}

ready() { [[ -e $1/.complete ]] && "$1/bin/python" -ISc '' 2>/dev/null; }

cached_venv() {
    local python version cache key venv
    [[ $(uname -sm) == "Linux x86_64" ]] \
        || fail "the lock file is for Linux x86_64, this is $(uname -sm); set PDKIT_PYTHON to a Python that has sglang"
    version=$(base_python)
    python=${version%% *} version=${version#* }
    cache=${PDKIT_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-$repo}/.cache}/sglang-pd-suite}
    if ! mkdir -p "$cache" || ! [[ -w $cache ]]; then fail "cannot write to $cache; set PDKIT_CACHE_DIR"; fi
    if has_gpu; then locks+=("$repo/requirements-gpu.lock"); else locks+=("$repo/requirements-cpu.lock"); fi
    key=$({ grep -hv "^ *#" "${locks[@]}"; echo "$UV_VERSION"; echo "$version"; } | sha256sum | cut -c1-12)
    venv=$(cd "$cache" && pwd)/venv-$key
    if ! ready "$venv"; then
        exec 9>"$venv.lock"
        flock --nonblock 9 || { say "another process is making $venv, waiting for it"; flock 9; }
        ready "$venv" || make_venv "$python" "$venv" >&2
        exec 9>&-
    fi
    echo "$venv/bin"
}

given_python() {
    local python
    python=$(command -v "$PDKIT_PYTHON") || fail "PDKIT_PYTHON=$PDKIT_PYTHON: no such program"
    "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("sglang") and f("sglang_router")))' \
        || fail "PDKIT_PYTHON=$PDKIT_PYTHON lacks sglang or sglang_router; install them there, or unset PDKIT_PYTHON"
    dirname "$python"
}

if [[ -n ${PDKIT_PYTHON:-} ]]; then bin=$(given_python); else bin=$(cached_venv); fi

if (($# == 0)); then
    dirname "$bin"
    exit
fi
unset PYTHONHOME
export PATH=$bin:$PATH PYTHONPATH=$repo/python${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
