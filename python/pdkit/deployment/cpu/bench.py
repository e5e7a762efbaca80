"""How fast a model runs with the shims, without servers: `python3 -m pdkit.deployment.cpu.bench dsv4|llama`.

Tokens for each second of CPU time, so that a machine which does other work, too, gives the same figures. The model runner
is SGLang's, as its own `benchmark/one_batch.py` drives it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from pdkit.deployment.cpu import checkpoints, plan

SIZES = (1, 256, 16), (16, 128, 16)  # sequences, tokens of each prompt, decode steps
MODELS = {model.name: model for model in (plan.LLAMA, plan.DSV4)}


def measure(server_args: Any, port_args: Any, _bench: Any, gpu_id: int, rank: int) -> None:
    """In place of `one_batch.latency_test`: loads the model, and prints a line for each of SIZES."""
    import numpy as np
    from sglang.benchmark import one_batch

    world_rank = one_batch.spawn_world_rank(server_args, tp_rank=rank, pp_rank=0)
    one_batch.publish(server_args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=world_rank, gpu_id=gpu_id))
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(server_args, port_args, gpu_id, rank)
    for count, length, steps in (SIZES[0], *SIZES):  # the first warms up
        prompts = np.random.default_rng(1).integers(3, 500, (count, length)).tolist()
        requests = one_batch.prepare_synthetic_inputs_for_latency_test(count, length, prompts)
        runner.clear()
        began = time.process_time()
        tokens, _, batch = runner.extend(requests)
        prefilled = time.process_time()
        for _ in range(steps):
            tokens, _ = runner.decode(tokens, batch)
        decoded = time.process_time()
        print(
            f"{count} x {length} tokens: prefill {count * length / (prefilled - began):.0f} tokens, "
            f"decode {count * steps / (decoded - prefilled):.0f} tokens a second of CPU",
            flush=True,
        )


def main() -> int:
    model = MODELS[sys.argv[1]]
    if os.environ.get("PDKIT_CPU_MODEL") != model.name:
        environment = {**os.environ, **plan.environment(model, plan.source())}
        return subprocess.call(
            [sys.executable, "-W", "ignore", "-m", "pdkit.deployment.cpu.bench", model.name], env=environment
        )
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch

    one_batch.latency_test = measure
    sys.argv[1:] = [
        "--model-path",
        str(checkpoints.provide(model.checkpoint)),
        "--batch-size",
        "16",
        *plan.FLAGS,
        *model.flags,
    ]
    one_batch.cli_main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
