"""A mixin that compares what SGLang computes with transformers' arithmetic on the same checkpoint.

class TestDisaggregationDSV4OneGpu(ReferenceMixin, MonolithicBesideMixin, ...):
    pass
"""

import requests


class ReferenceMixin:
    """Needs a kernel-sized checkpoint as `model`, `parity_plan()` and `monolithic_url`."""

    reference_prompts = 4

    def test_logprobs_are_those_of_transformers(self):
        from pdkit.kernel_nano.truth import Truth, expected

        prompts = self.prompts_of_the_reference()
        exact, rounded = expected(self.model, prompts)
        for name, url in (("monolithic", self.monolithic_url), ("prefill and decode", self.lb_url)):
            served = [self.input_logprobs(url, ids) for ids in prompts]
            truth = Truth(*(tuple(value for row in arm for value in row) for arm in (exact, rounded, served)))
            print(f"{name}: {truth.report()}", flush=True)
            truth.assert_passed()

    def prompts_of_the_reference(self):
        """Few-shot text of the data set, and one prompt so long that the indexer has to choose."""
        probes = [probe for round_ in self.parity_plan().concurrent for probe in round_.probes]
        natural = sorted(
            {tuple(probe.request["input_ids"]) for probe in probes if probe.name.startswith("natural")}, key=len
        )
        middle = [ids for ids in natural if 250 <= len(ids) <= 1100][: self.reference_prompts - 1]
        return [*middle, natural[-1]]

    def input_logprobs(self, url, ids):
        body = {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=300)
        self.assertEqual(answer.status_code, 200, answer.text[:300])
        found = [entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"]]
        return found[-(len(ids) - 1) :]
