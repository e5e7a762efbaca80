"""Runs a PD test file unedited, its servers supervised: as `coverage run FILE` measures one.

    python3 -m pdkit.deployment.attach FILE [ARGS]

Before FILE is run as `__main__`, the names of SGLang by which a test launches, waits for and ends its servers and runs
its evals are replaced by ours (`pdkit.deployment.quirks.SUBSTITUTED`). Names that the installed release lacks are an
error before anything starts.

    SGLANG_PD_MODEL      repository or directory to serve, whatever the test names
    SGLANG_PD_GSM8K      GSM8K questions as a .jsonl file, where the test names none
    SGLANG_PD_LOG_DIR    where the servers' logs and the transcripts go (default: a new temporary directory)
    PDKIT_SERVER_MODULE  what is run in the place of sglang.launch_server, `pdkit.engine` for one

Exit codes: those of the test; 3 if the installed release cannot be attached to.
"""

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import IO, Any

import sglang
from sglang.srt import utils as sglang_utils
from sglang.test import test_utils

from pdkit.core import recording
from pdkit.core.errors import ExitCode, NotReady
from pdkit.deployment import evals, fixture, quirks

MODEL_VARIABLE = "SGLANG_PD_MODEL"
QUESTIONS_VARIABLE = "SGLANG_PD_GSM8K"

# As they were before ours are put in their place; one that is missing is an error of `attach()`.
_launch_server: Any = getattr(test_utils, "popen_launch_server", None)
_cached_model: Any = getattr(test_utils, "try_cached_model", None)
_kill_process_tree: Any = getattr(sglang_utils, "kill_process_tree", None)
_terminate: Any = getattr(test_utils, "terminate_and_kill_process_tree", None)
_launch_pd_server: Any = getattr(test_utils, "popen_launch_pd_server", None)
_launch_command: Any = getattr(test_utils, "popen_with_error_check", None)


def _unused_name(servers: type[fixture.PDServers], name: str) -> str:
    """`name`, or the name with the next number where a server of that name runs already."""
    supervisor, number, found = servers.watching(), 1, name
    while (process := supervisor.process(found)) is not None and process.poll() is None:
        number += 1
        found = f"{name} {number}"
    return found


def popen_launch_pd_server(
    model: str,
    base_url: str,
    timeout: float,
    api_key: str | None = None,
    other_args: Sequence[Any] = (),
    env: dict[str, str] | None = None,
    return_stdout_stderr: tuple[IO[str], IO[str]] | None = None,
) -> subprocess.Popen[str]:
    """As SGLang's: starts a server and does not wait. Its name is its disaggregation mode."""
    servers = fixture.current()
    if servers is None:
        return _launch_pd_server(model, base_url, timeout, api_key, other_args, env, return_stdout_stderr)
    args = [*other_args, *(("--api-key", api_key) if api_key else ())]
    mode = args[args.index("--disaggregation-mode") + 1] if "--disaggregation-mode" in args else "server"
    return servers.launch_server(
        _unused_name(servers, mode), base_url, args, env, model, copies=(return_stdout_stderr or ())[:1]
    )


def popen_launch_server(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
    """SGLang's own, which waits until the server is ready; from then on it is watched, and ended with the class."""
    process = _launch_server(*args, **kwargs)
    if servers := fixture.current():
        servers.watching().watch(_unused_name(servers, "server"), process)
        servers.addClassCleanup(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        kill_process_tree(process.pid)


def popen_with_error_check(command: Sequence[str]) -> subprocess.Popen[str]:
    """As SGLang's, for load balancers that a test starts itself."""
    servers = fixture.current()
    return servers.launch(_unused_name(servers, "load balancer"), command) if servers else _launch_command(command)


def start_subprocess_fail_fast_watcher(
    named_procs: Sequence[tuple[str, subprocess.Popen[str] | None]],
) -> threading.Event:
    """Has processes watched that are not yet; ends nobody by `os._exit`, as SGLang's does before a report is written."""
    if servers := fixture.current():
        for name, process in named_procs:
            if process is not None and not servers.watching().watches(process):
                servers.watching().watch(_unused_name(servers, name), process)
    return threading.Event()


def kill_process_tree(parent_pid: int | None, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own; what a test ends on purpose is not a death."""
    if servers := fixture.current():
        if parent_pid is None or parent_pid == os.getpid():  # all that we started
            servers.watching().expect_all_exits()
        else:
            servers.watching().expect_exit_of(parent_pid)
    return _kill_process_tree(parent_pid, *args, **kwargs)


def terminate_and_kill_process_tree(process: subprocess.Popen[str], *args: Any, **kwargs: Any) -> None:
    """The same."""
    if servers := fixture.current():
        servers.watching().expect_exit(process)
    _terminate(process, *args, **kwargs)


def try_cached_model(model_repo: str) -> str:
    """SGLang's own, of the model that the environment names instead."""
    return _cached_model(os.environ.get(MODEL_VARIABLE) or model_repo)


def run_eval(args: SimpleNamespace) -> dict[str, Any]:
    """SGLang's own, recorded, on the questions that the environment names where `args` names none."""
    if getattr(args, "eval_name", None) == "gsm8k" and not getattr(args, "gsm8k_data_path", None):
        args.gsm8k_data_path = os.environ.get(QUESTIONS_VARIABLE) or None
    return evals.run_eval(args)


OURS = {
    "PDDisaggregationServerBase": fixture.PDServers,
    "popen_launch_pd_server": popen_launch_pd_server,
    "popen_launch_server": popen_launch_server,
    "popen_with_error_check": popen_with_error_check,
    "start_subprocess_fail_fast_watcher": start_subprocess_fail_fast_watcher,
    "kill_process_tree": kill_process_tree,
    "terminate_and_kill_process_tree": terminate_and_kill_process_tree,
    "try_cached_model": try_cached_model,
    "run_eval": run_eval,
}


def attach(release: str = sglang.__version__) -> None:
    """Puts our names in the place of SGLang's, in this process. Raises NotReady where the release lacks some."""
    places = [
        (importlib.import_module(module), name)
        for module, names in quirks.substituted(release).items()
        for name in names
    ]
    if missing := [f"{there.__name__}.{name}" for there, name in places if not hasattr(there, name)]:
        raise NotReady(
            f"sglang {release} has no {', '.join(missing)}: its tests cannot be attached to; "
            "take a release that pdkit.deployment.quirks names, or run the file by itself"
        )
    for there, name in places:
        setattr(there, name, OURS[name])


def main(argv: Sequence[str]) -> None:
    """`FILE [ARGS]`: runs FILE attached and recorded; whatever it raises, SystemExit too, is raised."""
    if not argv:
        sys.exit("usage: python3 -m pdkit.deployment.attach FILE [ARGS]")
    try:
        attach()
    except NotReady as error:
        print(f"attach: error: {error}", file=sys.stderr)
        sys.exit(ExitCode.NOT_READY)
    recording.install()
    recording.run_file(argv[0], argv[1:])


if __name__ == "__main__":
    from pdkit.deployment import attach as module  # not this copy of it, which is called __main__

    module.main(sys.argv[1:])
