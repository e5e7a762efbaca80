"""The shape of SGLang's tests that start both servers themselves, by `popen_launch_pd_server`."""

import os
import time
import unittest
from types import SimpleNamespace

from sglang.srt.utils import kill_process_tree
from sglang.test.run_eval import run_eval
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    popen_launch_pd_server,
    try_cached_model,
)


class TestOverridesStart(PDDisaggregationServerBase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = try_cached_model("some-organization/some-model")
        cls.start_prefill()
        cls.start_decode()
        cls.wait_server_ready(cls.prefill_url + "/health")
        cls.wait_server_ready(cls.decode_url + "/health")
        cls.launch_lb()

    @classmethod
    def start_prefill(cls):
        prefill_args = ["--trust-remote-code", "--disaggregation-mode", "prefill", "--tp", "2"]
        prefill_args += ["--disaggregation-bootstrap-port", cls.bootstrap_port]
        prefill_args += cls.transfer_backend + cls.rdma_devices
        cls.process_prefill = popen_launch_pd_server(
            cls.model, cls.prefill_url, timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, other_args=prefill_args
        )

    @classmethod
    def start_decode(cls):
        decode_args = ["--trust-remote-code", "--disaggregation-mode", "decode", "--tp", "2", "--base-gpu-id", "2"]
        decode_args += ["--disaggregation-bootstrap-port", cls.bootstrap_port]
        decode_args += cls.transfer_backend + cls.rdma_devices
        cls.process_decode = popen_launch_pd_server(
            cls.model, cls.decode_url, timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, other_args=decode_args
        )

    def test_gsm8k(self):
        args = SimpleNamespace(
            base_url=self.lb_url,
            model=self.model,
            eval_name="gsm8k",
            api="completion",
            max_tokens=512,
            num_examples=40,
            num_threads=20,
        )
        metrics = run_eval(args)
        self.assertGreater(metrics["score"], 0.9)

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process_decode.pid)  # some tests end a server themselves, before the fixture does
        time.sleep(float(os.environ.get("SECONDS_BEFORE_THE_END", 0)))
        super().tearDownClass()


if __name__ == "__main__":
    unittest.main()
