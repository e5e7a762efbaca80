#!/usr/bin/env bash
# What Mooncake and NIXL are linked against and pip does not bring, for the target sglang-cpu: Debian's packages.
# With root they are installed. Without it they are unpacked into the cache, where the target finds them.
set -euo pipefail
libraries=(libibverbs.so.1 libnl-3.so.200 libnl-route-3.so.200 libnuma.so.1)
packages=(libibverbs1 libnl-3-200 libnl-route-3-200 libnuma1)
unpacked=${PDKIT_CACHE_DIR:-${XDG_CACHE_HOME:-~/.cache}/sglang-pd-suite}/debian-libraries

say() { printf 'transfer_libraries.sh: %s\n' "$*" >&2; }

missing=()
for index in "${!libraries[@]}"; do
    if ! ldconfig -p | grep -qF "${libraries[index]} "; then missing+=("${packages[index]}"); fi
done
if [[ ${#missing[@]} == 0 || -e $unpacked/.complete ]]; then exit; fi
if ! command -v apt-get >/dev/null; then
    say "no apt-get here; install ${missing[*]} (or what this system calls them)"
    exit 3
fi
if [[ $(id -u) == 0 ]]; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >/dev/null \
        || { say "apt-get could not install ${missing[*]}"; exit 3; }
    exit
fi
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
(cd "$packed" && apt-get download -q "${missing[@]}" >/dev/null) \
    || { say "apt-get could not download ${missing[*]}; apt-get update needs root"; exit 3; }
mkdir -p "$unpacked"
for package in "$packed"/*.deb; do dpkg-deb -x "$package" "$unpacked"; done
touch "$unpacked/.complete"
