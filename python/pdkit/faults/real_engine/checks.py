"""Which check sees which wrong transfer of the real engine, in one launch."""

import contextlib
import json
import time
from dataclasses import replace
from functools import partial

from pdkit.checks import acceptance
from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.accounting.ledger import Ledger
from pdkit.checks.accuracy.sglang_eval import gsm8k_metrics
from pdkit.checks.http import RequestFailed, flush_caches, post
from pdkit.checks.parity.answers import Answer, Arm
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Round, generate_probe
from pdkit.checks.parity.references import collect
from pdkit.checks.parity.verdict import Parity
from pdkit.faults.driver import NO_FAULT, Check, observe, tabulate
from pdkit.faults.real_engine.backends import PIECES_VARIABLE, SWITCH_VARIABLE
from pdkit.faults.real_engine.blocks import pieces_of
from pdkit.faults.real_engine.library import LIBRARY, WITH_CANARY
from pdkit.faults.switch import Switch


class TransferFaults(acceptance.DraftMeasures, ParityArms):
    """Put it before the monolithic server.

    compress_ratios       tokens a compressed entry, for each layer of the model without its draft
    min_score             share of right answers below which accuracy sees something
    transfer_faults       names of faults of `pdkit.faults.real_engine.library`
    kv_canary             whether `server_args` have SGLang's --kv-canary: it adds buffers to what is transferred
    fault_timeout         seconds for one request while a fault is on
    transfer_timeout      seconds after which SGLang gives up a KV transfer
    """

    needs: tuple[str, ...] = ("configure", "server_env", "backend")

    transfer_switch: Switch
    server_module = "pdkit.faults.real_engine.server"
    compress_ratios = ()
    transfer_faults = tuple(name for name in LIBRARY if name not in WITH_CANARY)
    kv_canary = False
    min_score = 0.95
    accuracy_examples = 60
    acceptance_length_prompts = 32
    acceptance_length_tokens = 96
    fault_timeout = 30.0
    transfer_timeout = 10
    returning = 60
    other_length = 600

    @classmethod
    def configure(cls) -> None:
        super().configure()
        cls.transfer_switch = Switch(cls.temporary_path("transfer-faults-", "switch"), LIBRARY)
        cls.server_env = {
            **cls.server_env,
            SWITCH_VARIABLE: str(cls.transfer_switch.path),
            PIECES_VARIABLE: json.dumps(pieces_of(cls.compress_ratios, cls.kv_canary)),
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(cls.transfer_timeout),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(cls.transfer_timeout),
        }

    @classmethod
    def take_references(cls) -> None:
        plan = cls.parity_plan()
        for round_ in (*plan.alone, *plan.rooms, *plan.indexed):
            cls.references_of(round_)

    def parity_of(self, round_: Round) -> str | None:
        """What is wrong with the answers to a round; None if nothing is."""
        reference, control = self.references_of(round_)
        parity = Parity.of(round_, reference, self.answers(round_), control)
        print(f"    {round_.condition}: {parity.candidate_distribution.report()}", flush=True)
        if parity.control_distribution:
            print(f"      control: {parity.control_distribution.report()}", flush=True)
        return "; ".join(parity.problems) or None

    def answers(self, round_: Round) -> Arm:
        """The pair's. For what is sent alone decode begins with empty caches each time, see `overwrite`."""
        if round_.in_flight > 1:
            return collect(self.lb_url, round_, self.fault_timeout)
        answers: list[Answer] = []
        for probe in round_.probes:
            self.empty_caches(self.decode_url)
            answers += collect(self.lb_url, replace(round_, probes=(probe,)), self.fault_timeout)
        return answers

    def accuracy(self) -> str | None:
        score = gsm8k_metrics(self.lb_url, self.model, self.gsm8k_data_path, self.accuracy_examples)["score"]
        return None if score > self.min_score else f"score {score:.3f}"

    def acceptance_length(self) -> str | None:
        measured = self.measure_acceptance(self.lb_url, self.decode_url)
        assert isinstance(measured, acceptance.Acceptance), measured
        reference, ratio = self.acceptance_length_reference, self.acceptance_length_ratio
        return self.verdict(acceptance.AcceptanceGate(measured, reference, ratio))

    def first_drafts(self) -> str | None:
        measured = self.measure_first_drafts(self.lb_url, self.decode_url)
        assert isinstance(measured, acceptance.Acceptance) and self.first_drafts_reference, measured
        return self.verdict(acceptance.FirstDrafts(measured, self.first_drafts_reference))

    @staticmethod
    def verdict(gate: acceptance.AcceptanceGate | acceptance.FirstDrafts) -> str | None:
        print(f"    {gate.report()}", flush=True)
        return None if gate.passed else gate.report()

    def message_of(self, ledger: Ledger, look: Check) -> str | None:
        """What a check says, or what it raises, with its requests in `ledger`."""
        self.empty_caches(self.prefill_url, self.decode_url)
        try:
            with ledger.open():
                return look()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def empty_caches(self, *urls: str) -> None:
        for url in urls:
            with contextlib.suppress(RequestFailed):
                flush_caches([url], self.fault_timeout)

    def overwrite(self) -> None:
        """Decode's memory gets other content: what is not written must not be found there by chance.

        The checks ask the same for each fault. With empty caches each begins with the pages that are used first here,
        by as many prompts as any of them sends at once, and as long as those.
        """
        probes = tuple(
            generate_probe(f"other-{seed}", [10 + seed * index % 241 for index in range(self.other_length)], 2)
            for seed in range(7, 7 + self.first_drafts_prompts)
        )
        self.empty_caches(self.prefill_url, self.decode_url)
        collect(self.lb_url, Round("other content", probes, len(probes)), self.fault_timeout)

    def until_served(self) -> None:
        """What a fault broke must not be taken for what the next one does."""
        deadline, body = time.monotonic() + self.returning, {"text": "1", "sampling_params": {"max_new_tokens": 2}}
        while True:
            answer = post(self.lb_url, "/generate", body, self.fault_timeout)
            if answer.status_code == 200:
                return
            self.assertLess(time.monotonic(), deadline, f"not served after the fault was off: {answer.text[:300]}")
            time.sleep(0.5)


class TransferFaultChecks(TransferFaults):
    """Each fault is seen by a check that compares answers, drafts or scores."""

    def fault_checks(self) -> dict[str, Check]:
        """What is asked with each fault on: name -> function that returns what is wrong, or None."""
        self.take_acceptance_reference()
        self.take_first_drafts_reference()
        return {
            "parity alone": lambda: self.parity_of(self.parity_plan().alone[0]),
            "parity rooms": lambda: self.parity_of(self.parity_plan().rooms[0]),
            "parity indexed": lambda: self.parity_of(self.parity_plan().indexed[0]),
            "accuracy": self.accuracy,
            "acceptance": self.acceptance_length,
            "first drafts": self.first_drafts,
        }

    @unaccounted
    def test_seeded_faults_of_the_transfer(self) -> None:
        checks = self.fault_checks()
        observations = []
        for name in (None, *self.transfer_faults):
            self.overwrite()
            print(f"fault of the transfer: {(name and LIBRARY[name]) or NO_FAULT}", flush=True)
            ledger = Ledger([self.lb_url], self.fault_timeout)
            asked = {check: partial(self.message_of, ledger, look) for check, look in checks.items()}
            observations.append(
                observe(self.transfer_switch, name, {**asked, "accounting": partial(self.unanswered, ledger)})
            )
            self.until_served()
        wrong = tabulate(
            f"faults of the transfer, {self.backend}",
            observations,
            lambda name: name is not None and not LIBRARY[name].harmless,
        )
        self.assertFalse(wrong, "\n".join(wrong))

    @staticmethod
    def unanswered(ledger: Ledger) -> str | None:
        """What is wrong with the account of all that was asked; None if nothing is."""
        account = ledger.account()
        return account.report() if account.problems else None
