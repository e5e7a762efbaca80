"""A mixin that gives a disaggregation test ports of its own, so that several run on one machine.

class TestDisaggregationDSV4Here(ClaimedPortsMixin, TestDisaggregationDSV4):
    pass
"""

from pdkit import ports


class ClaimedPortsMixin:
    """Every attribute `*_port` of the class is a port that nobody else uses; the URLs follow."""

    prefill_nccl_port = decode_nccl_port = None  # fixtures before 0.5.18 have none, and leave NCCL's to chance

    @classmethod
    def configure(cls):
        super().configure()
        free = []
        for name in [name for name in dir(cls) if name.endswith("_port")]:
            if not free:
                block = ports.claim()
                cls.addClassCleanup(block.release)
                free = list(block.ports)
            setattr(cls, name, str(free.pop(0)))
        cls.prefill_url = f"http://{cls.base_host}:{cls.prefill_port}"
        cls.decode_url = f"http://{cls.base_host}:{cls.decode_port}"
        cls.base_url = cls.lb_url = f"http://{cls.base_host}:{cls.lb_port}"


class ClaimedRendezvousMixin(ClaimedPortsMixin):
    """For DP attention: a server then listens on the ports that follow the one of --dist-init-addr, too.

    Unset, that is its own port + 233 (`ZMQ_TCP_PORT_DELTA`), where another run may have its servers.
    """

    @classmethod
    def rendezvous(cls):
        block = ports.claim()
        cls.addClassCleanup(block.release)
        return ["--dist-init-addr", f"127.0.0.1:{block.ports[0]}"]

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + cls.rendezvous()

    @classmethod
    def decode_args(cls):
        return super().decode_args() + cls.rendezvous()

    @classmethod
    def monolithic_args(cls):
        return super().monolithic_args() + cls.rendezvous()
