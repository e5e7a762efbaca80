"""`python3 -m pdkit.engine`: load the model, bind the ports, serve until SIGTERM."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdkit.core.command import run_command
from pdkit.core.errors import ExitCode, NotReady, UsageError
from pdkit.engine import options as engine_options

if TYPE_CHECKING:
    from pdkit.engine.service import Service


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A bound socket that does not listen yet, so that clients are refused while the model loads. Raises NotReady."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        with socket.create_server((host, port), family=sock.family):
            pass
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise NotReady(f"{host}:{port} cannot be bound: {reason}; choose another with {flag}") from None
    return sock


def listen(sock: socket.socket) -> None:
    """Another server may have bound the same port while the model loaded; the first to listen has it. Raises NotReady."""
    try:
        sock.listen()
    except OSError as error:
        host, port = sock.getsockname()[:2]
        reason = os.strerror(error.errno or 0)
        raise NotReady(f"{host}:{port} was taken meanwhile: {reason}; choose another port") from None


async def serve(
    options: engine_options.EngineOptions,
    service: Service,
    sock: socket.socket,
    bootstrap_socket: socket.socket | None,
) -> None:
    import uvicorn

    from pdkit.engine.api import create_app

    for each in filter(None, (bootstrap_socket, sock)):
        listen(each)
    await service.start(bootstrap_socket)
    await service.forward_one_token()
    print(f"pdkit.engine: {options.disaggregation_mode} server ready on {options.host}:{options.port}", flush=True)
    config = uvicorn.Config(
        create_app(service), log_level=options.log_level, access_log=options.log_level == "debug",
        timeout_graceful_shutdown=2, timeout_keep_alive=options.keep_alive,
    )  # fmt: skip
    await uvicorn.Server(config).serve(sockets=[sock])


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Serve until SIGTERM; what a user has to put right is one line on standard error."""
    return run_command("pdkit.engine", run, sys.argv[1:] if argv is None else argv)


def run(argv: Sequence[str]) -> ExitCode:
    """Serve. Raises UsageError, and NotReady where a port is taken."""
    options = engine_options.parse(argv)
    sock = bind(options.host, options.port, "--port")
    bootstrap_socket = None
    if options.disaggregation_mode == "prefill":
        bootstrap_socket = bind(options.host, options.disaggregation_bootstrap_port, "--disaggregation-bootstrap-port")

    import torch
    import transformers
    import uvloop

    from pdkit.engine.service import Service
    from pdkit.models.cpu.model import ModelError, load_model

    torch.set_num_threads(1)
    sys.setswitchinterval(0.0005)
    try:
        model = load_model(options.model_path, load_format=options.load_format, seed=options.random_seed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model_path, local_files_only=True)
        service = Service(options, model, tokenizer)
    except (ModelError, OSError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    try:
        uvloop.run(serve(options, service, sock, bootstrap_socket))
    except OSError:  # of a server that runs: a bug, not bad usage
        traceback.print_exc()
        return ExitCode.FAILED
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
