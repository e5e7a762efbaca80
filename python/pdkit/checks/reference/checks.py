"""What SGLang computes against transformers' arithmetic on the same checkpoint."""

from collections.abc import Sequence

from pdkit.checks.http import generate, greedy
from pdkit.checks.parity.checks import ParityArms


class ReferenceChecks(ParityArms):
    """Logprobs of prompts of the parity plan; `model` is a checkpoint of the size that the kernels need."""

    reference_prompts = 4

    def test_logprobs_are_those_of_transformers(self) -> None:
        from pdkit.checks.reference.truth import LogprobTruth, expected

        prompts = self.prompts_of_the_reference()
        exact, rounded = expected(self.model, prompts)
        for name, url in (("monolithic", self.monolithic_url), ("prefill and decode", self.lb_url)):
            served = [self.input_logprobs(url, ids) for ids in prompts]
            truth = LogprobTruth(*(tuple(value for row in arm for value in row) for arm in (exact, rounded, served)))
            print(f"{name}:", flush=True)
            truth.assert_passed()

    def prompts_of_the_reference(self) -> list[tuple[int, ...]]:
        """Few-shot text of the data set, and one prompt so long that the indexer has to choose."""
        probes = [probe for round_ in self.parity_plan().concurrent for probe in round_.probes]
        natural = sorted(
            {tuple(probe.request["input_ids"]) for probe in probes if probe.name.startswith("natural")}, key=len
        )
        middle = [ids for ids in natural if 250 <= len(ids) <= 1100][: self.reference_prompts - 1]
        return [*middle, natural[-1]]

    def input_logprobs(self, url: str, ids: Sequence[int]) -> list[float]:
        body = {
            "input_ids": list(ids),
            "sampling_params": greedy(1),
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        found = [entry[0] for entry in generate(url, body, timeout=300)["meta_info"]["input_token_logprobs"]]
        return found[-(len(ids) - 1) :]
