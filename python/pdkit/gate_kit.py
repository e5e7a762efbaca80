"""Mixins that put the accuracy gate and the acceptance-length gates on a disaggregation test.

    class TestDisaggregationDSV4Gated(AccuracyGateMixin, TestDisaggregationDSV4):
        gsm8k_gate_policy = "auto"

They work over any subclass of SGLang's `PDDisaggregationServerBase`: what they need of it is `lb_url`, `decode_url` and
`model`. `gsm8k_data_path`, `min_score` and `monolithic_url` are taken from the class where it has them, which
`FirstDraftsMixin` asks of it.
"""

from types import SimpleNamespace

from pdkit import acceptance
from pdkit.core import events
from pdkit.gate import GateOptions
from pdkit.sequential_eval import few_shot_prompts, gsm8k_gate, paired_gate

FIRST_LOOK = "accuracy gate"  # name of the check


class AccuracyGateMixin:
    """`test_gsm8k` with stated error rates.

    gsm8k_gate_policy   "first-look" (200 examples once), "sequential", or "auto", see `pdkit.gate.Policy`
    monolithic_url      where the class has one that is up, see `pdkit.monolithic_kit`: it is asked the same examples,
                        and the two are compared
    """

    gsm8k_gate_policy = "auto"

    def gsm8k_args(self, base_url):
        """What `run_eval` is told, but for which examples."""
        return SimpleNamespace(
            base_url=base_url,
            model=self.model,
            eval_name="gsm8k",
            api="completion",
            max_tokens=512,
            num_threads=128,
            num_shots=5,
            gsm8k_data_path=getattr(self, "gsm8k_data_path", None),
        )

    def test_gsm8k(self):
        options = GateOptions(policy=self.gsm8k_gate_policy, threshold=getattr(self, "min_score", 0.95))
        gate = gsm8k_gate(self.gsm8k_args(self.lb_url), options)
        print(gate.report(), flush=True)
        if gate.first_look_passed is not None:
            events.verdict(FIRST_LOOK, gate.first_look_passed, gate.first_look_alone())
        gate.assert_passed()
        if monolithic_url := getattr(self, "monolithic_url", None):
            paired = paired_gate(gate, self.gsm8k_args(monolithic_url))
            print(paired.report(), flush=True)
            paired.assert_passed()


class _AcceptanceKit:
    """Acceptance of drafts on prompts of GSM8K, and at the monolithic server."""

    @classmethod
    def _accepted(cls, url, decode_url, prompts, tokens):
        asked = few_shot_prompts(getattr(cls, "gsm8k_data_path", None), prompts)
        return acceptance.measure(url, decode_url, asked, tokens)

    @classmethod
    def _baseline(cls, measure):
        baseline = measure(cls.monolithic_url, cls.monolithic_url)
        assert isinstance(baseline, acceptance.Acceptance), f"{cls.monolithic_url}, the baseline: {baseline}"
        return baseline

    def _measured_or_skipped(self, measure):
        measured = measure(self.lb_url, self.decode_url)
        if isinstance(measured, acceptance.NotApplicable):
            self.skipTest(measured.report())
        return measured


class AcceptanceLengthMixin(_AcceptanceKit):
    """Speculative decoding must accept about as much as the reference says, on prompts of GSM8K sent through the LB.

    acceptance_length_reference   tokens per verification step that a sound engine reaches on this load; where it is
                                  None, the server at `monolithic_url` is measured on the same prompts
    acceptance_length_ratio       share of the reference that is asked for
    acceptance_length_prompts     how many prompts
    acceptance_length_tokens      of each answer
    """

    acceptance_length_reference = None
    acceptance_length_ratio = 0.95
    acceptance_length_prompts = 64
    acceptance_length_tokens = 256

    def test_acceptance_length(self):
        measured = self._measured_or_skipped(self.measure_acceptance)
        if self.acceptance_length_reference is None and getattr(self, "monolithic_url", None):
            self.take_acceptance_reference()
        gate = acceptance.AcceptanceGate(measured, self.acceptance_length_reference, self.acceptance_length_ratio)
        print(gate.report(), flush=True)
        events.measurement("acceptance length", measured.length)
        gate.assert_passed()

    @classmethod
    def take_acceptance_reference(cls):
        """From the monolithic server; to be called while it is up where it stops before the test asks."""
        cls.acceptance_length_reference = cls._baseline(cls.measure_acceptance).length

    @classmethod
    def measure_acceptance(cls, url, decode_url):
        return cls._accepted(url, decode_url, cls.acceptance_length_prompts, cls.acceptance_length_tokens)


class FirstDraftsMixin(_AcceptanceKit):
    """Drafts of the first tokens after the hand-over must be accepted as often as those of the monolithic server.

    monolithic_url         it, up when the test asks, unless `take_first_drafts_reference` was called while it was
    first_drafts_prompts   how many prompts of GSM8K
    first_drafts_tokens    of each answer. The first one comes with the hand-over; with one draft token a step, an even
                           number of others, so that even a single refused draft costs a step
    """

    first_drafts_prompts = 64
    first_drafts_tokens = 25
    first_drafts_reference = None

    def test_drafts_after_the_hand_over(self):
        measured = self._measured_or_skipped(self.measure_first_drafts)
        if self.first_drafts_reference is None:
            self.take_first_drafts_reference()
        gate = acceptance.FirstDrafts(measured, self.first_drafts_reference)
        print(gate.report(), flush=True)
        gate.assert_passed()

    @classmethod
    def take_first_drafts_reference(cls):
        """From the monolithic server; to be called while it is up where it stops before the test asks."""
        cls.first_drafts_reference = cls._baseline(cls.measure_first_drafts)

    @classmethod
    def measure_first_drafts(cls, url, decode_url):
        return cls._accepted(url, decode_url, cls.first_drafts_prompts, cls.first_drafts_tokens)
