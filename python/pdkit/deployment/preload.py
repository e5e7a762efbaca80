"""What test files, embedded servers and load balancers import of others, for `pdkit.core.fork_server`.

Nothing of ours, and not `sglang.test` itself: what they read from the environment while they are imported, such as
the ports of a test, differs from file to file.
"""

import importlib
import sys

MODULES = """
    numpy scipy.stats torch transformers requests aiohttp fastapi uvicorn orjson jinja2 pydantic safetensors.torch
    sglang.launch_server sglang.srt.server_args sglang.test.test_utils sglang.test.run_eval
    sglang.test.server_fixtures.disaggregation_fixture sglang_router.launch_router sglang_router.mini_lb
""".split()
AGAIN = "sglang.test"  # its own share of the time is small


def prepare() -> None:
    """Imports what is installed of it."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported: {name}: {error}", flush=True)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{AGAIN}.")]:
        del sys.modules[name]
    vars(sys.modules.get("sglang", sys)).pop("test", None)
