"""SGLang's checksum of transfers (0.5.21 and newer) with DeepSeek-V4: what its parser takes ends prefill's first request.

docs/findings/checksum-ends-prefill.md says why.
"""

import argparse
from pathlib import Path

from pdkit.preflight.dsv4 import is_dsv4
from pdkit.preflight.finding import Finding, Level

FLAG = "--disaggregation-enable-kv-checksum"
SOURCE = Path("sglang", "srt", "disaggregation", "checksum.py")
POOL = "DeepSeekV4TokenToKVPool"


def check(root: Path, args: argparse.Namespace) -> list[Finding]:
    """An error where a server of DeepSeek-V4 gets the flag from a release, unpacked at `root`, that lacks its pools."""
    source = root / SOURCE
    if not getattr(args, "disaggregation_enable_kv_checksum", False) or not source.is_file():
        return []
    model = Path(args.model_path)
    if not is_dsv4(args.model_path, model if model.is_dir() else None) or POOL in source.read_text():
        return []
    return [
        Finding(
            Level.ERROR, FLAG, f"not for DeepSeek-V4: {SOURCE.name} knows no {POOL}; prefill's first request ends it"
        )
    ]
