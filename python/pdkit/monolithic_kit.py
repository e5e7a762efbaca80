"""Mixins that launch the monolithic server which a `pdkit.parity_kit.ParityMixin` compares with.

Put one before ParityMixin and a subclass of `TestDisaggregationDSV4`, whose `launch_server` and `supervisor` it uses: a
monolithic server that dies, at any time, fails the class with the tail of its log.
"""

import time
from concurrent.futures import ThreadPoolExecutor

STOP_TIMEOUT = 60


class _MonolithicMixin:
    """A server that is watched like the others. `monolithic_args()`: its command line."""

    monolithic_port = monolithic_nccl_port = None
    process_monolithic = None

    @classmethod
    def monolithic_args(cls):
        return [*cls.server_args, "--nccl-port", cls.monolithic_nccl_port]

    @classmethod
    def configure(cls):
        super().configure()
        if cls.monolithic_port is None:
            cls.monolithic_port = str(int(cls.lb_port) + 600)
        if cls.monolithic_nccl_port is None:
            cls.monolithic_nccl_port = str(int(cls.monolithic_port) + 1)
        cls.monolithic_url = f"http://{cls.base_host}:{cls.monolithic_port}"

    @classmethod
    def _start_monolithic(cls):
        pair = cls.supervisor.processes
        cls.process_monolithic = cls.launch_server("monolithic", cls.monolithic_url, cls.monolithic_args())
        cls.supervisor.processes = lambda: {**pair(), "monolithic": cls.process_monolithic}

    @classmethod
    def _stop_monolithic(cls):
        from sglang.srt.utils import kill_process_tree

        process, cls.process_monolithic = cls.process_monolithic, None
        if process is None:
            return
        if process.poll() is None:
            time.sleep(0.1)  # a look of the supervisor that saw it is over before it ends
            kill_process_tree(process.pid)
            process.wait(STOP_TIMEOUT)
        process.kill_orphans()

    @classmethod
    def tearDownClass(cls):
        try:
            super().tearDownClass()
        finally:
            cls._stop_monolithic()


class MonolithicBesideMixin(_MonolithicMixin):
    """Where there is room for a third server: it stays up, and is asked while the load balancer starts."""

    @classmethod
    def start_decode(cls):
        super().start_decode()
        cls._start_monolithic()

    @classmethod
    def launch_lb(cls):
        cls.wait_server_ready(f"{cls.monolithic_url}/health")
        with ThreadPoolExecutor(1) as pool:
            references = pool.submit(cls.take_references)
            super().launch_lb()
            with cls.failing_with_a_death():
                references.result()


class MonolithicFirstMixin(_MonolithicMixin):
    """Where the GPUs are needed twice: its answers are taken, it is stopped, then prefill and decode start."""

    @classmethod
    def start_prefill(cls):
        cls.ask_monolithic()
        super().start_prefill()

    @classmethod
    def ask_monolithic(cls):
        """All of the monolithic server's life; `pdkit.contract.recording` leaves it out by this name."""
        cls._start_monolithic()
        cls.wait_server_ready(f"{cls.monolithic_url}/health")
        with cls.failing_with_a_death():
            cls.take_references()
        cls._stop_monolithic()
        cls.monolithic_url = None
