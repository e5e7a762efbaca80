"""A deployment that somebody else runs: it is asked, nothing is launched or ended, no cache is emptied."""

import contextlib
import os
import tempfile
from collections.abc import Callable

from sglang.test.test_utils import CustomTestCase

from pdkit.deployment import attached, fixture


class ExternalServers(CustomTestCase):
    """Takes the place of a launch. `pdkit.deployment.attached` says what the environment names."""

    target = "attached"
    engine: str
    base_url: str
    lb_url: str
    prefill_url: str | None
    decode_url: str | None
    prefill_urls: tuple[str, ...]
    decode_urls: tuple[str, ...]
    monolithic_url: str | None
    model: str
    tokenizer_path: str | None
    log_dir: str
    gsm8k_data_path = os.getenv("SGLANG_PD_GSM8K") or None
    answering: set[str] = set()

    @classmethod
    def setUpClass(cls) -> None:
        deployment = attached.Deployment.of()
        attached.send_key(deployment)
        served = attached.probe(deployment)
        cls.model = deployment.model if deployment.model in served.names else served.names[0]
        cls.tokenizer_path = deployment.tokenizer or served.model_path
        cls.base_url = cls.lb_url = deployment.base_url
        cls.monolithic_url = deployment.baseline_url
        cls.prefill_urls, cls.decode_urls = deployment.prefill_urls, deployment.decode_urls
        cls.prefill_url, cls.decode_url = (urls[0] if urls else None for urls in (cls.prefill_urls, cls.decode_urls))
        cls.engine = f"at {cls.lb_url}"
        cls.log_dir = os.getenv(fixture.LOG_DIR_VARIABLE) or tempfile.mkdtemp(prefix=f"{cls.target}-")
        cls.answering = {cls.lb_url}  # `probe` asked it; more is the checks' affair
        fixture.enter(cls)
        cls.addClassCleanup(fixture.leave, cls)
        print(f"target={cls.target} engine={cls.engine} model={cls.model}", flush=True)

    @classmethod
    def log_path(cls, name: str, kind: str = "log") -> str:
        return os.path.join(cls.log_dir, f"{cls.__name__}.{name.replace(' ', '_')}.{kind}")

    @classmethod
    def heartbeat(cls) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Nobody is watched here."""
        return contextlib.nullcontext(lambda: None)
