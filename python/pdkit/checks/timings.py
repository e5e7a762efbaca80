"""What the KV transfer costs beside a monolithic server in the same run; printed, no time is asserted."""

import random
import statistics
import time
from collections.abc import Sequence

from pdkit.checks.accuracy.sglang_eval import gsm8k_metrics
from pdkit.checks.base import Checks
from pdkit.checks.http import generate, greedy


class TimingChecks(Checks):
    """Throughput, and the time to a first token.

    transfer_lengths     prompt lengths in tokens; transfer_repeats: prompts of each
    throughput_examples  how many GSM8K examples each server is asked
    """

    needs: tuple[str, ...] = ("lb_url", "monolithic_url", "model", "gsm8k_data_path")

    transfer_lengths = (128, 512, 1024, 2048, 4096)
    transfer_repeats = 5
    throughput_examples = 100

    def test_report_throughput(self) -> None:
        pair, alone = (
            gsm8k_metrics(url, self.model, self.gsm8k_data_path, self.throughput_examples)["output_throughput"]
            for url in (self.lb_url, self.monolithic_url)
        )
        print(
            f"throughput of {self.throughput_examples} GSM8K examples: {pair:.0f} output tokens/s prefill and decode, "
            f"{alone:.0f} monolithic, ratio {pair / alone:.2f}",
            flush=True,
        )

    def test_report_time_of_hand_over(self) -> None:
        print("prompt tokens  one token: monolithic  prefill and decode  difference", flush=True)
        rng = random.Random(0)
        for length in self.transfer_lengths:
            alone, handed = [], []
            for _ in range(self.transfer_repeats):
                ids = [rng.randrange(10, 250) for _ in range(length)]
                alone.append(self.one_token(self.monolithic_url, ids))
                handed.append(self.one_token(self.lb_url, ids))
            one, two = statistics.median(alone), statistics.median(handed)
            print(f"{length:13}  {one * 1e3:18.1f} ms  {two * 1e3:15.1f} ms  {(two - one) * 1e3:7.1f} ms", flush=True)

    def one_token(self, url: str, ids: Sequence[int]) -> float:
        """Seconds to an answer of one token."""
        body = {"input_ids": ids, "sampling_params": greedy(1)}
        begin = time.perf_counter()
        answer = generate(url, body, timeout=300)
        seconds = time.perf_counter() - begin
        self.assertEqual(answer["meta_info"]["completion_tokens"], 1)
        return seconds
