"""What SGLang calls in each of its processes at start-up, by the entry point in assets/sglang-cpu-site.

SGLang logs the exception of a plugin and goes on. Here a failure ends the process, and success leaves a line in its log
which `pdkit.deployment.cpu.plan.require_active` looks for.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback

from pdkit.deployment.cpu import registry

FAMILY_VARIABLE = "PDKIT_CPU_MODEL"  # "llama" or "dsv4": which kernels are needed; COMMON: what all models need
COMMON = "any"
FAILED = 97
ACTIVE = "pdkit: SGLang's GPU kernels are replaced by torch"


def families(model: str, nixl: bool) -> set[registry.Family]:
    """What a process that serves a `model` of that kind needs, with or without NIXL."""
    found: set[registry.Family] = {"any"}
    if model == "dsv4":
        found |= {"dsv4", "speculative"}
    if nixl:
        found.add("nixl")
    return found


def activate() -> None:
    """Install the replacements that are not yet, unless there is a GPU. Ends the process if that fails."""
    import torch

    if torch.cuda.is_available():
        return
    try:
        from pdkit.deployment.cpu import shims  # noqa: F401  registers

        model = os.environ[FAMILY_VARIABLE]
        installed = registry.install(families(model, importlib.util.find_spec("nixl") is not None))
    except BaseException:
        traceback.print_exc()
        print("pdkit: the CPU shims could not be installed (above)", file=sys.stderr, flush=True)
        os._exit(FAILED)
    print(f"{ACTIVE}: {model}, {len(installed)} names, process {os.getpid()}", file=sys.stderr, flush=True)
