"""What servers and routers on CPU import, for `pdkit.core.fork_server`.

SGLang spawns the processes of a server, each importing everything again: here they are forked, too.
What only the spawned start of SGLang can show is not seen.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from pdkit.deployment.cpu import plugin, registry

MODULES = """
    sglang.launch_server sglang.srt.entrypoints.http_server sglang.srt.managers.detokenizer_manager
    sglang.srt.managers.scheduler sglang.srt.models.registry sglang_router.launch_router
""".split()


def prepare() -> Callable[[], None]:
    """Imports what any model needs, also the plugins that servers load. Returns what each child calls first."""
    import torch

    assert not torch.cuda.is_available(), "with a GPU servers cannot be forked"
    for name in MODULES:
        importlib.import_module(name)
    from sglang.srt.plugins import load_plugins

    os.environ[plugin.FAMILY_VARIABLE] = plugin.COMMON
    load_plugins()
    for replacement in registry.REPLACEMENTS:
        with contextlib.suppress(ImportError):  # of what is not installed; who needs it sees that when it is replaced
            importlib.import_module(replacement.module)
    multiprocessing.set_start_method("fork", force=True)
    for owner, name, ours in (
        (BaseProcess, "run", named_by_their_work(BaseProcess.run)),
        (multiprocessing, "set_start_method", lambda method, force=False: None),  # SGLang asks for spawn
    ):
        setattr(owner, name, ours)
    return plugin.activate


def named_by_their_work(run: Callable[[BaseProcess], None]) -> Callable[[BaseProcess], None]:
    """`run` of a process that is forked: its name in /proc is that of the function it runs.

    `setproctitle`, by which SGLang names its processes, has no effect in a forked one.
    """

    def named(process: BaseProcess) -> None:
        target = getattr(getattr(process, "_target", None), "__name__", process.name)
        with open("/proc/self/comm", "w") as comm:
            comm.write(target[:15])
        run(process)

    return named
