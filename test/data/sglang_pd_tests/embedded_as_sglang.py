"""Stands for `sglang.launch_server` in tests of `pdkit.deployment.attach`: the embedded engine, under SGLang's flags.

What the embedded engine does not know (GPUs, parallelism, kernels) is dropped; the transfer backend is its own.
"""

import sys

from pdkit.engine.__main__ import main

KEPT = {"--model-path", "--host", "--port", "--disaggregation-mode", "--disaggregation-bootstrap-port", "--random-seed"}
KEPT |= {"--load-format", "--api-key"}


def kept(argv):
    """The flags of `argv` that the engine knows, with their values."""
    words, keep = [], False
    for word in argv:
        keep = word in KEPT if word.startswith("--") else keep
        words += [word] * keep
    return words


if __name__ == "__main__":
    sys.exit(main(kept(sys.argv[1:])))
