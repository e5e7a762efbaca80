"""The servers of a test class, for a study that asks them: started without its tests, and ended with the study."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

TARGETS = ("embedded", "sglang-cpu")


def three(target: str, model: str = "dsv4-trained", **attributes: Any) -> type:
    """Pair and monolithic server of one of TARGETS, the latter with a `model`; `attributes` of their class."""
    from pdkit.deployment.monolithic import MonolithicBeside

    if target == "embedded":
        from pdkit.deployment.embedded import EmbeddedServers

        return type("Servers", (MonolithicBeside, EmbeddedServers), {})
    from pdkit.deployment.cpu import plan
    from pdkit.deployment.cpu.servers import SglangCpuServers

    models = {"dsv4": plan.DSV4, "dsv4-trained": plan.TRAINED_DSV4, "llama": plan.LLAMA}
    return type("Servers", (MonolithicBeside, SglangCpuServers), {"cpu_model": models[model], **attributes})


@contextmanager
def served(cls: Any) -> Iterator[Any]:
    """A subclass of `cls` whose servers are up: its URLs and processes.

    Raises what the class does where they do not start, NotReady where the machine lacks what they need.
    """

    class Servers(cls):
        @classmethod
        def server_class(cls, name: str, environment: Mapping[str, str]) -> Any:
            return type("Quiet", (super().server_class(name, environment),), {"reaches_console": False})

        @classmethod
        def take_references(cls) -> None:
            """Nothing is compared."""

        def runTest(self) -> None:
            """Nothing: only what the class starts is used."""

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="study-"))
        Servers.log_dir = os.getenv("SGLANG_PD_LOG_DIR") or folder
        stack.callback(Servers.doClassCleanups)
        Servers.setUpClass()
        stack.callback(Servers.tearDownClass)
        yield Servers
