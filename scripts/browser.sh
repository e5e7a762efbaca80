#!/usr/bin/env bash
# Where there is no Chromium, installs Debian's headless one: with it the tests look at the HTML report. Needs root.
set -euo pipefail
for browser in chromium-headless-shell chromium google-chrome; do
    if command -v "$browser" >/dev/null; then exit; fi
done
if ! command -v apt-get >/dev/null || [[ $(id -u) != 0 ]]; then
    echo "browser.sh: no Chromium, and no root on a Debian to install it; its tests will be skipped" >&2
    exit 3
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core; } >/dev/null \
    || { echo "browser.sh: apt-get could not install chromium-headless-shell; its tests will be skipped" >&2; exit 3; }
