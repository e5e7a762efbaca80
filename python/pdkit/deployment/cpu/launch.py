"""SGLang's server as this target starts it, for tests that are not ours: `python3 -m pdkit.deployment.cpu.launch ARGS`.

    PDKIT_SERVER_MODULE=pdkit.deployment.cpu.launch SGLANG_TEST_PD_DISAGG_BACKEND=mooncake_tcp \\
        python3 -m pdkit.deployment.attach FILE

ARGS are those of `sglang.launch_server`. Whatever model they name, the trained Llama is served, on CPU.

    PDKIT_SERVER_FLAGS   more flags, which win over those of ARGS
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from pdkit.deployment.cpu import checkpoints, plan

FLAGS_VARIABLE = "PDKIT_SERVER_FLAGS"


def command(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command of the server; of flags that are repeated the last counts."""
    of_a_pair = plan.PD_FLAGS if "--disaggregation-mode" in argv else []
    ours = ["--model-path", str(checkpoints.provide(plan.LLAMA.checkpoint)), "--base-gpu-id", "0"]
    more = shlex.split(environ.get(FLAGS_VARIABLE, ""))
    server = [sys.executable, "-m", "sglang.launch_server"]
    return [*server, *plan.FLAGS, *plan.LLAMA.flags, *of_a_pair, *argv, *ours, *more]


if __name__ == "__main__":
    os.execve(sys.executable, command(sys.argv[1:]), {**os.environ, **plan.environment(plan.LLAMA, plan.source())})
