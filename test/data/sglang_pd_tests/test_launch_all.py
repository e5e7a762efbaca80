"""The shape of SGLang's tests that let the fixture launch all, with arguments of their own."""

import unittest

import requests
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase
from sglang.test.test_utils import try_cached_model


class TestLaunchAll(PDDisaggregationServerBase):
    extra_prefill_args = ["--mem-fraction-static", "0.5"]
    extra_decode_args = ["--mem-fraction-static", "0.5", "--max-running-requests", "16"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = try_cached_model("some-organization/some-model")
        cls.launch_all()

    def test_completion(self):
        body = {"text": "Question: What is 1 + 1?\nAnswer:", "sampling_params": {"max_new_tokens": 4}}
        answer = requests.post(f"{self.lb_url}/generate", json=body, timeout=60)
        self.assertEqual(answer.status_code, 200, answer.text)
        self.assertEqual(answer.json()["meta_info"]["completion_tokens"], 4)

    def test_processes(self):
        for process in (self.process_prefill, self.process_decode, self.process_lb):
            self.assertIsNone(process.poll())


if __name__ == "__main__":
    unittest.main()
