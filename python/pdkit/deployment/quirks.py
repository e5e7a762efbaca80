"""What differs between the releases of SGLang that serve DeepSeek-V4 (0.5.12 and newer), in one place.

The suite is written for the newest release; what an older one lacks or calls otherwise is settled here.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from pdkit.core.host import installed

# The names of SGLang that `pdkit.deployment.attach` substitutes: module -> name -> first release that has it.
SUBSTITUTED: Mapping[str, Mapping[str, str]] = {
    "sglang.test.test_utils": {
        "popen_launch_pd_server": "0.5.12",
        "popen_with_error_check": "0.5.12",
        "popen_launch_server": "0.5.12",
        "try_cached_model": "0.5.12",
        "kill_process_tree": "0.5.12",
        "start_subprocess_fail_fast_watcher": "0.5.13",
        "terminate_and_kill_process_tree": "0.5.17",
    },
    "sglang.test.server_fixtures.disaggregation_fixture": {
        "PDDisaggregationServerBase": "0.5.12",
        "popen_launch_pd_server": "0.5.12",
        "popen_with_error_check": "0.5.12",
        "kill_process_tree": "0.5.12",
        "start_subprocess_fail_fast_watcher": "0.5.13",
        "terminate_and_kill_process_tree": "0.5.19",
    },
    "sglang.test.run_eval": {"run_eval": "0.5.12"},
    "sglang.srt.utils": {"kill_process_tree": "0.5.12"},
}

# Attributes of ServerArgs -> the flag of releases that have them, and of those that lack them.
RENAMED_FLAGS = {"cuda_graph_max_bs_decode": ("--cuda-graph-max-bs-decode", "--cuda-graph-max-bs")}

COPIES_PAST_THE_END = "mask = start_index + offs < sz"
COPIERS = "kernels/ops/memory/memcpy_triton.py", "srt/layers/dp_attention.py"
BOUNDED = "sz = sz.clamp("  # the finding's patch, in the latter
LAST_THAT_OVERWRITES = "0.5.23"
LETS_EMPTY_TEXT_PASS = "(isinstance(texts, list) and len(texts) == 0)"


def as_installed(argv: Sequence[str | None], server_args: type) -> list[str]:
    """Command line of a server in the words of the release whose ServerArgs `server_args` is; `argv` is in the newest's.

    A flag whose value is None is left out: fixtures before 0.5.18 have no NCCL port to give.
    """
    older = {new: old for name, (new, old) in RENAMED_FLAGS.items() if not hasattr(server_args, name)}
    words = list(argv)
    while None in words:
        value = words.index(None)
        del words[value - 1 : value + 1]
    return [older.get(word, word) for word in map(str, words)]


def substituted(release: str) -> dict[str, list[str]]:
    """The names that `pdkit.deployment.attach` substitutes in `release`, by module."""
    return {
        module: [name for name, since in names.items() if is_since(release, since)]
        for module, names in SUBSTITUTED.items()
    }


def is_since(release: str, first: str) -> bool:
    """Whether `release` is `first` or newer; a release candidate counts as its release."""
    numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (release, first)]
    return numbers[0] >= numbers[1]


# Releases in which the indexer's kernel can end a server of DeepSeek-V4, and the switch that avoids it:
# docs/findings/indexer-plan-past-the-last-row.md.
READ_PAST_THE_END = ("0.5.12", "0.5.15", "0.5.16", "0.5.17")
INDEXER_SWITCH = "SGLANG_OPT_USE_JIT_INDEXER_METADATA"
OFF = "0", "false", "no", "n"


def indexer_environment() -> dict[str, str]:
    """What servers of the installed release need to be safe from the indexer's read past the end."""
    return {INDEXER_SWITCH: OFF[0]} if installed("sglang") in READ_PAST_THE_END else {}


def is_exposed_by_indexer(environ: Mapping[str, str]) -> bool:
    """Whether a server of DeepSeek-V4 with this environment can end by it."""
    return installed("sglang") in READ_PAST_THE_END and environ.get(INDEXER_SWITCH, "").lower() not in OFF


def source_says(path: str, text: str) -> bool:
    """Whether the file `path` of the installed sglang has `text`; nothing is imported."""
    sglang = PathFinder.find_spec("sglang", sys.path)
    source = Path(sglang.origin).parent / path if sglang and sglang.origin else None
    return source is not None and source.is_file() and text in source.read_text()


def empty_text_is_fatal() -> str | None:
    """Why a tokenizer that makes no token of an empty text must not be given one by the installed release, if so.

    Releases that refuse it look at `not texts` (`TokenizerManager._tokenize_one_request`).
    """
    if source_says("srt/managers/tokenizer_manager.py", LETS_EMPTY_TEXT_PASS):
        return "it ends prefill in this release of SGLang (docs/findings/empty-text-ends-prefill.md)"
    return None


def prompt_logprobs_are_fatal(args: Sequence[str]) -> str | None:
    """Why servers of the installed release with the flags `args` must not be asked for logprobs of a prompt, if so.

    With DP attention and EAGLE, they overwrite memory: docs/findings/prompt-logprobs-overwrite-memory.md.
    """
    given = {word.partition("=")[0] for word in args}
    if "--speculative-algorithm" not in given or not given & {"--enable-dp-attention", "--attn-dp-size"}:
        return None
    if any(source_says(path, COPIES_PAST_THE_END) for path in COPIERS) and not source_says(COPIERS[1], BOUNDED):
        return "it overwrites memory in this release of SGLang (docs/findings/prompt-logprobs-overwrite-memory.md)"
    return None


def overwritten_by_prompt_logprobs(info: Mapping[str, object]) -> bool:
    """The same of a running server, by its /server_info; releases after LAST_THAT_OVERWRITES are taken to be fixed."""
    version = str(info.get("version") or "")
    exposed = info.get("enable_dp_attention") and info.get("speculative_algorithm")
    return bool(exposed and re.match(r"\d", version) and is_since(LAST_THAT_OVERWRITES, version))
