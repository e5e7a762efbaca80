"""What the programs of a test run import, for `pdkit.core.fork_server`; by name, so that no room has to import another.

Of ours only what neither reads the environment while it is imported nor sets it, and not `sglang.test` itself: that, such
as the ports of a test, differs from file to file.
"""

import importlib
import sys

RUNNER = """
    unittest.mock pdkit.core.recording pdkit.runner.guardian pdkit.runner.listing pdkit.runner.registered pdkit.runner.suite
    pdkit.preflight.environment.require
""".split()
COMMANDS = (
    "pdkit.cli.main pdkit.cli.check pdkit.cli.history pdkit.cli.plan pdkit.cli.preflight pdkit.cli.report".split()
)
SERVERS = """
    numpy scipy.stats torch transformers transformers.models.deepseek_v4.modeling_deepseek_v4 requests aiohttp fastapi uvicorn
    orjson jinja2 pydantic safetensors.torch sglang.launch_server sglang.srt.server_args sglang.test.test_utils
    sglang.test.run_eval sglang.test.server_fixtures.disaggregation_fixture sglang_router.launch_router sglang_router.mini_lb
""".split()
AGAIN = "sglang.test"  # its own share of the time is small


def little() -> None:
    """What the runner itself, a guardian and a recorded test file are made of."""
    _import(RUNNER)


def much() -> None:
    """Also what test files, embedded servers and load balancers import of others."""
    _import([*SERVERS, *RUNNER, *COMMANDS])
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{AGAIN}.")]:
        del sys.modules[name]
    vars(sys.modules.get("sglang", sys)).pop("test", None)


def _import(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported: {name}: {error}", flush=True)
