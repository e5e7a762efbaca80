"""Targets on a machine without a GPU: two embedded engines that serve a nano DeepSeek-V4."""

from pdkit.core.paths import ASSETS
from pdkit.deployment.fixture import PlannedServers
from pdkit.deployment.ports import ClaimedPorts

RANDOM_WEIGHTS = ["--load-format", "dummy", "--random-seed", "1"]


class EmbeddedServers(ClaimedPorts, PlannedServers):
    """Prefill and decode are `pdkit.engine`, a process each."""

    target = "embedded"
    engine = server_module = "pdkit.engine"
    silence_s, answer_s = 20.0, 20.0

    model_name = str(ASSETS / "nano-dsv4")
    gsm8k_data_path = str(ASSETS / "gsm8k_nano.jsonl")

    @classmethod
    def prefill_args(cls) -> list[str]:
        return [*cls._mode("prefill"), *cls.extra_prefill_args]

    @classmethod
    def decode_args(cls) -> list[str]:
        return [*cls._mode("decode"), *cls.extra_decode_args]

    @classmethod
    def monolithic_args(cls) -> list[str]:
        return ["--disaggregation-mode", "null", *cls.server_args]

    @classmethod
    def _mode(cls, mode: str) -> list[str]:
        port = ["--disaggregation-bootstrap-port", cls.bootstrap_port]
        return ["--disaggregation-mode", mode, *port, *cls.server_args]


class RandomEmbeddedServers(EmbeddedServers):
    """The same with random weights: never sure of itself, so that each piece of its state shows in its logprobs."""

    model_name = str(ASSETS / "random-dsv4")
    server_args = RANDOM_WEIGHTS
