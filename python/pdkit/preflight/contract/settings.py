"""What the parsed arguments of a server mean for GPUs and ports, asked of the release that parsed them."""

import argparse
from types import SimpleNamespace
from typing import Any
from unittest import mock

NAMES = (
    "tp_size",
    "pp_size",
    "nnodes",
    "base_gpu_id",
    "gpu_id_step",
    "mem_fraction_static",
    "host",
    "port",
    "nccl_port",
    "moe_a2a_backend",
    "disaggregation_mode",
    "disaggregation_transfer_backend",
    "disaggregation_ib_device",
)


def widths(args: argparse.Namespace) -> dict[str, int]:
    """How often the model is replicated (`replicas`), and into how many groups attention is split (`attention_dp`).

    Until 0.5.21 `--dp-size` is either, by --enable-dp-attention; since 0.5.22 --attn-dp-size is the latter, and the
    flag moves --dp-size there. DP attention of width 1 is none.
    """
    attention_dp = getattr(args, "attn_dp_size", None) or 1
    if args.enable_dp_attention and attention_dp == 1:
        return {"replicas": 1, "attention_dp": args.dp_size}
    return {"replicas": args.dp_size, "attention_dp": attention_dp}


def of_server(args: argparse.Namespace) -> dict[str, Any]:
    """Plain data that the GPU plan is made from."""
    return {name: getattr(args, name, None) for name in NAMES} | widths(args)


def _as_server_args(args: argparse.Namespace, cls: type) -> SimpleNamespace:
    """`args` with the properties of ServerArgs, which itself might look for the model when it is made."""

    class Raw(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            found = getattr(cls, name)
            return found.fget(self) if isinstance(found, property) and found.fget else found

    return Raw(**vars(args))


def ports_of_server(args: argparse.Namespace, server_args: Any) -> dict[str, int]:
    """Ports that a server listens on or wants to be free when it starts, by what they are for.

    HTTP and, on the prefill side, bootstrap are its arguments; the rest is what the release's own
    `PortArgs.init_new` (module `server_args`) waits for. A port that is drawn at random when the server starts is
    left out.
    """
    ports = {"http": args.port}
    if args.disaggregation_mode == "prefill":
        ports["bootstrap"] = args.disaggregation_bootstrap_port
    wide = widths(args)
    raw = _as_server_args(args, server_args.ServerArgs)
    raw.enable_dp_attention = wide["attention_dp"] > 1
    if hasattr(raw, "attn_dp_size"):
        raw.attn_dp_size, raw.dp_size = wide["attention_dp"], wide["replicas"]

    def note(port: int, name: str = "port", *_: object, **__: object) -> None:
        ports[name.removesuffix("_port")] = port

    drawn = {name: 0 for name in vars(server_args) if name.startswith("get_free_port")}
    patches: dict[str, Any] = {"wait_port_available": note} | {name: lambda *_: 0 for name in drawn}
    if hasattr(server_args, "resolving_view"):
        patches["resolving_view"] = lambda config: config
    with mock.patch.multiple(server_args, **patches):
        port_args = server_args.PortArgs.init_new(raw)
    ports["nccl"] = port_args.nccl_port
    return {name: port for name, port in ports.items() if port}
