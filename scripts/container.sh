#!/usr/bin/env bash
# Builds a container image of the light install, `pdkit check` and its like, without a registry of images: its root is
# made by debootstrap. Needs root, debootstrap, and buildah, podman or docker; 200 MB of downloads, 3 minutes.
#
#   scripts/container.sh [NAME]           build NAME (default: pdkit)
#   podman run --network host NAME check http://127.0.0.1:8000 --baseline http://127.0.0.1:8001
set -euo pipefail

readonly NAME=${1:-pdkit} RELEASE=bookworm PYTHON=3.11 MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

say() { printf 'container: %s\n' "$*" >&2; }
fail() { say "$*"; exit 3; }

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v debootstrap >/dev/null || fail "needs debootstrap; on Debian: apt-get install debootstrap"
[[ $(id -u) == 0 ]] || fail "needs root: debootstrap makes a root file system"
for builder in buildah podman docker ""; do
    [[ -n $builder ]] || fail "needs buildah, podman, or docker with its daemon; on Debian: apt-get install buildah"
    if command -v "$builder" >/dev/null && "$builder" info >/dev/null 2>&1; then break; fi
done

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
say "a Debian $RELEASE root with Python $PYTHON"
debootstrap --variant=minbase --include=python3-venv,ca-certificates "$RELEASE" "$context/root" "$MIRROR" >"$context/log" \
    || { tail -5 "$context/log" >&2; fail "debootstrap failed"; }
tar --one-file-system -C "$context/root" -cf "$context/root.tar" .
rm -rf "$context/root"
say "the package and what it needs, as wheels"
python3 -m pip wheel --quiet --no-deps --wheel-dir "$context/wheels" "$repo"
python3 -m pip download --quiet --only-binary :all: --python-version "$PYTHON" --platform manylinux_2_28_x86_64 \
    --platform manylinux2014_x86_64 --dest "$context/wheels" "$context"/wheels/sglang_pd_suite-*.whl pip
cp "$repo/Containerfile" "$context"
say "building $NAME with $builder"
if [[ $builder == buildah ]]; then
    buildah build --isolation "${BUILDAH_ISOLATION:-chroot}" --tag "$NAME" "$context"
else
    "$builder" build --tag "$NAME" --file "$context/Containerfile" "$context"
fi
