"""SGLang's server with wrapped transfer backends: `python3 -m pdkit.faults.real_engine.server`, options of `launch_server`.

Its processes are spawned, and a spawned process imports the main module of its parent: they all come by here.
"""

import runpy

import torch  # noqa: F401  before the backends, as in SGLang: they use its CUDA libraries

from pdkit.faults.real_engine.backends import install

install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
