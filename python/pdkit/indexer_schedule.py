"""A defect of some releases of SGLang that ends servers of DeepSeek-V4, and the switch that avoids it.

The indexer's kernel is DeepGEMM's `sm90_fp8_paged_mqa_logits`; which SM scores which rows (a row is a token) is planned
before. To 0.5.17 SGLang's plan (`paged_mqa_metadata.cuh`) starts an SM without work at the row after the last, and the
DeepGEMM that some of these releases pin reads the length of the row it starts at before it looks for work
(`SM90PagedMQALogitsScheduler`, until 0.1.3 `PagedMQALogitsScheduler`). The lengths of 128 rows fill the 512 bytes of
their allocation; if the next page is not mapped, the server ends by an illegal memory access. DeepGEMM's own plan, and
SGLang's since 0.5.18, start such an SM at row 0, if any row has an entry. `scripts/indexer_schedule.py` shows it.
"""

from collections.abc import Mapping

from pdkit import versions

READ_PAST_THE_END = ("0.5.12", "0.5.15", "0.5.16", "0.5.17")
SWITCH = "SGLANG_OPT_USE_JIT_INDEXER_METADATA"
OFF = "0", "false", "no", "n"


def environment() -> dict[str, str]:
    """What servers of the installed release need to be safe from it."""
    return {SWITCH: OFF[0]} if versions.installed("sglang") in READ_PAST_THE_END else {}


def is_exposed(environ: Mapping[str, str]) -> bool:
    """Whether a server of DeepSeek-V4 with this environment can end by it."""
    return versions.installed("sglang") in READ_PAST_THE_END and environ.get(SWITCH, "").lower() not in OFF
