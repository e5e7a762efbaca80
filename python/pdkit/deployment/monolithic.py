"""A monolithic server that the pair is compared with, launched and watched like the others.

Put one of the classes before a `PlannedServers`, and the checks that compare before it.
"""

from concurrent.futures import ThreadPoolExecutor

from pdkit.deployment.mixin import BeforePlannedServers
from pdkit.deployment.server import Server


class _Monolithic(BeforePlannedServers):
    """`take_references()` of the checks before it is called while the server is up."""

    monolithic_port: str | None = None
    monolithic_nccl_port: str | None = None
    monolithic_url = ""  # as is, or again, while there is none
    process_monolithic: Server | None = None

    @classmethod
    def configure(cls) -> None:
        super().configure()
        if cls.monolithic_port is None:
            cls.monolithic_port = str(int(cls.lb_port) + 600)
        if cls.monolithic_nccl_port is None:
            cls.monolithic_nccl_port = str(int(cls.monolithic_port) + 1)
        cls.monolithic_url = f"http://{cls.base_host}:{cls.monolithic_port}"

    @classmethod
    def start_monolithic(cls) -> None:
        cls.process_monolithic = cls.launch_server("monolithic", cls.monolithic_url, cls.monolithic_args())

    @classmethod
    def tearDownClass(cls) -> None:
        super().tearDownClass()
        cls.process_monolithic = None


class MonolithicBeside(_Monolithic):
    """Where there is room for a third server: it stays up, and is asked while the load balancer starts."""

    @classmethod
    def start_decode(cls) -> None:
        super().start_decode()
        cls.start_monolithic()

    @classmethod
    def launch_lb(cls) -> None:
        cls.wait_server_ready(f"{cls.monolithic_url}/health")
        pool = ThreadPoolExecutor(1)
        references = pool.submit(cls.take_references)
        try:
            super().launch_lb()
            with cls.failing_with_a_death():
                references.result()
        finally:
            pool.shutdown(wait=False)  # after a death nobody waits for answers that are still asked for


class MonolithicFirst(_Monolithic):
    """Where the GPUs are needed twice: its answers are taken, it is stopped, then prefill and decode start."""

    @classmethod
    def start_prefill(cls) -> None:
        cls.ask_monolithic()
        super().start_prefill()

    @classmethod
    def ask_monolithic(cls) -> None:
        """All of the monolithic server's life; `pdkit.preflight.contract.recording` leaves it out by this name."""
        cls.start_monolithic()
        cls.wait_server_ready(f"{cls.monolithic_url}/health")
        with cls.failing_with_a_death():
            cls.take_references()
        process, cls.process_monolithic = cls.process_monolithic, None
        assert process is not None  # just started
        cls.watching().expect_exit(process)
        process.stop()
        cls.monolithic_url = ""
