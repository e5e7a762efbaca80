"""Launches two prefill and two decode servers behind one router."""


class ScaleOutServers:
    """Put it before FleetMixin."""

    router_timeout = waiting_timeout = settling = 60
    bootstrap_timeout = 10

    prefill_2_port = decode_2_port = bootstrap_2_port = None
    prefill_2_url: str
    decode_2_url: str

    @classmethod
    def configure(cls):
        super().configure()
        for name in ("prefill", "decode", "bootstrap"):
            if getattr(cls, f"{name}_2_port") is None:
                setattr(cls, f"{name}_2_port", str(int(getattr(cls, f"{name}_port")) + 10))
        cls.prefill_2_url = f"http://{cls.base_host}:{cls.prefill_2_port}"
        cls.decode_2_url = f"http://{cls.base_host}:{cls.decode_2_port}"

    @classmethod
    def prefills(cls):
        return [*super().prefills(), (cls.prefill_2_url, cls.bootstrap_2_port)]

    @classmethod
    def decodes(cls):
        return [*super().decodes(), cls.decode_2_url]

    @classmethod
    def prefill_2_args(cls):
        return [cls.bootstrap_2_port if arg == cls.bootstrap_port else arg for arg in cls.prefill_args()]

    @classmethod
    def decode_2_args(cls):
        return cls.decode_args()

    @classmethod
    def start_prefill(cls):
        super().start_prefill()
        cls.fleet["prefill 2"] = cls.launch_server("prefill 2", cls.prefill_2_url, cls.prefill_2_args())

    @classmethod
    def start_decode(cls):
        super().start_decode()
        cls.fleet["decode 2"] = cls.launch_server("decode 2", cls.decode_2_url, cls.decode_2_args())

    @classmethod
    def launch_lb(cls):
        for url in (cls.prefill_2_url, cls.decode_2_url):
            cls.wait_server_ready(f"{url}/health")
        super().launch_lb()
