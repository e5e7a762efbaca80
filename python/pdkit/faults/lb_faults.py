"""Whether parity sees what a faulty load balancer does, beside a pair of any engine.

    class TestDisaggregationDSV4OneGpu(BalancerFaultChecks, ParityChecks, MonolithicBeside, OneGpuServers):
        pass

It starts SGLang's mini load balancer a second time, with a switch (`pdkit.faults.load_balancer`), over the same
servers.
"""

import os
import subprocess
import sys
import time
from functools import partial

from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.http import RequestFailed
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Round
from pdkit.checks.parity.references import collect
from pdkit.checks.parity.verdict import Parity
from pdkit.faults.driver import observe, tabulate
from pdkit.faults.switch import VARIABLE, Switch, find


class BalancerFaultChecks(ParityArms):
    """Each fault in turn is on, and parity asks.

    balancer_faults  names of faults of `pdkit.faults.library`, the most harmful to the servers last
    unseen_faults    why parity does not see some of them although they are harmful
    """

    needs: tuple[str, ...] = ("base_host", "start_decode", "log_path", "wait_server_ready")

    balancer_faults = (
        "prefill-late",
        "request-duplicated",
        "answers-swapped",
        "first-token-repeated",
        "stop-lost",
        "sampling-lost",
        "rooms-swapped",
    )
    unseen_faults = {
        "request-duplicated": "the answers are right; it takes the servers' own counts of requests to see it"
    }
    faulty_lb_port = ""
    switch: Switch
    fault_timeout = 30.0

    @classmethod
    def start_decode(cls) -> None:
        super().start_decode()
        cls.switch = Switch(cls.temporary_path("fault-switch-", "switch"))
        command = [sys.executable, "-m", "pdkit.faults.load_balancer", "--pd-disaggregation", "--mini-lb"]
        command += ["--prefill", cls.prefill_url, "--decode", cls.decode_url]
        command += ["--host", cls.base_host, "--port", cls.faulty_lb_port]
        with open(cls.log_path("faulty load balancer"), "w") as log:
            process = subprocess.Popen(
                command, env={**os.environ, VARIABLE: str(cls.switch.path)}, stdout=log, stderr=subprocess.STDOUT
            )
        cls.addClassCleanup(process.wait)
        cls.addClassCleanup(process.kill)

    @unaccounted
    def test_seeded_faults_of_the_load_balancer(self) -> None:
        url = f"http://{self.base_host}:{self.faulty_lb_port}"
        self.wait_server_ready(f"{url}/health")
        rounds = {"parity rooms": self.parity_plan().rooms[0], "parity request parameters": self.parameter_round()[1]}
        observations = []
        for name in (None, *self.balancer_faults):
            checks = {check: partial(self.seen, url, round_) for check, round_ in rounds.items()}
            observations.append(observe(self.switch, name, checks))
            self.until_right(url, rounds["parity rooms"], name)
        wrong = tabulate("faults of the load balancer", observations, self.is_seen_by_parity)
        self.assertFalse(wrong, "\n".join(wrong))

    def is_seen_by_parity(self, name: str | None) -> bool:
        return not (name is None or find(name).harmless or name in self.unseen_faults)

    def until_right(self, url: str, round_: Round, name: str | None) -> None:
        """What a fault broke must not be taken for what the next one does."""
        deadline = time.monotonic() + self.fault_timeout
        while wrong := self.seen(url, round_):
            self.assertLess(time.monotonic(), deadline, f"the pair does not answer right after {name}: {wrong}")

    def seen(self, url: str, round_: Round) -> str | None:
        """What is wrong with the answers to a round sent to `url`, in one line; None if nothing is."""
        reference, control = self.references_of(round_)
        try:
            candidate = collect(url, round_, self.fault_timeout)
        except RequestFailed as failure:
            return " ".join(str(failure).split())[:200]
        problems = Parity.of(round_, reference, candidate, control).problems
        return " ".join(problems[0].split())[:200] if problems else None
