"""What test files, embedded servers and load balancers import of others, for `pdkit.core.fork_server`.

Nothing of ours: what our modules read from the environment while they are imported differs from file to file.
"""

import importlib

MODULES = """
    numpy scipy.stats torch transformers requests aiohttp fastapi uvicorn orjson jinja2 pydantic safetensors.torch
    sglang.launch_server sglang.srt.server_args sglang.test.test_utils sglang.test.run_eval
    sglang.test.server_fixtures.disaggregation_fixture sglang_router.launch_router sglang_router.mini_lb
""".split()


def prepare() -> None:
    """Imports what is installed of it."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported: {name}: {error}", flush=True)
