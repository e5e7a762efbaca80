"""The command line of the engine: SGLang's flag names where SGLang has the flag."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from pdkit.core.command import Parser, count, port
from pdkit.core.errors import UsageError

MODES = ("null", "prefill", "decode")


@dataclass(frozen=True)
class EngineOptions:
    """Times are seconds, sizes are tokens or requests."""

    model_path: str
    host: str = "127.0.0.1"
    port: int = 30000
    served_model_name: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    random_seed: int = 0
    context_length: int | None = None
    chunked_prefill_size: int = 128
    disable_radix_cache: bool = False
    enable_cache_report: bool = False
    disaggregation_mode: str = "null"
    disaggregation_bootstrap_port: int = 8998
    disaggregation_transfer_backend: str = "tcp"
    bootstrap_timeout: int = 300
    transfer_timeout: int = 300
    keep_alive: int = 5
    log_level: str = "info"

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_path


def parse(argv: Sequence[str] | None = None) -> EngineOptions:
    """EngineOptions from a command line. Raises UsageError.

    The timeouts come from the variables that SGLang reads them from, and mean what they mean there: prefill gives up a
    request whose decode server has not asked for it in time, decode one whose state has not come in time, and each
    closes a connection that idles for longer than it is kept alive.
    """
    parser = Parser(prog="python3 -m pdkit.engine", description="Embedded DeepSeek-V4 engine (CPU).")
    add = parser.add_argument
    add("--model-path", "--model", required=True, help="directory with config.json, tokenizer and weights")
    add("--host", default=EngineOptions.host)
    add("--port", type=port, default=EngineOptions.port)
    add("--served-model-name")
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights from --random-seed")
    add("--random-seed", type=int, default=0)
    add("--context-length", type=count, help="default: max_position_embeddings of the model")
    add("--chunked-prefill-size", type=count, default=EngineOptions.chunked_prefill_size,
        help="tokens a prefill step; also the grain of the prefix cache")  # fmt: skip
    add("--disable-radix-cache", action="store_true", help="no prefix cache")
    add("--enable-cache-report", action="store_true", help="cached tokens in the usage of OpenAI's answers")
    add("--disaggregation-mode", choices=MODES, default="null")
    add("--disaggregation-bootstrap-port", type=port, default=EngineOptions.disaggregation_bootstrap_port)
    add("--disaggregation-transfer-backend", default="tcp", metavar="tcp|MODULE:CLASS")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    given = vars(parser.parse_args(argv))
    for name, variable in (
        ("bootstrap_timeout", "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"),
        ("transfer_timeout", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT"),
        ("keep_alive", "SGLANG_TIMEOUT_KEEP_ALIVE"),
    ):
        text = os.environ.get(variable) or getattr(EngineOptions, name)
        try:
            given[name] = count(text)
        except ValueError:
            raise UsageError(f"{variable}={text!r} is not a positive whole number of seconds") from None
    return EngineOptions(**{field.name: given[field.name] for field in fields(EngineOptions)})
