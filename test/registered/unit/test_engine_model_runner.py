"""Forward passes of the engine: transformers' results, whatever the chunks, the company and the prefix cache.

And the state that is transferred: all of it, bit for bit, and nothing that does not belong.
"""

import contextlib
import ctypes
import io
import math
import os
import tempfile
import threading
import unittest
from types import SimpleNamespace
from unittest import mock

import torch
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.paths import ASSETS
from pdkit.engine import state
from pdkit.engine.forward import _scale
from pdkit.engine.model_runner import ROWS, ModelRunner, gather_rows
from pdkit.engine.prefix_cache import PrefixCache
from pdkit.engine.request import Request, SamplingParams
from pdkit.engine.scheduler import Scheduler
from pdkit.models.cpu.model import load_model
from transformers import AutoTokenizer

register_cpu_ci(est_time=16, suite="stage-a-test-cpu")

RANDOM = ASSETS / "random-dsv4"

torch.set_num_threads(1)
model = load_model(RANDOM, load_format="dummy", seed=7)
tokenizer = AutoTokenizer.from_pretrained(RANDOM, local_files_only=True)
runner = ModelRunner(model)
LENGTHS = (1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 512, 513, 700)
config = model.config
PROMPT = torch.randint(config.vocab_size, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(0)).tolist()[0]


@torch.inference_mode()
def run(cache, ids):
    """Logits [1, V] after `ids`, which `cache` takes up."""
    return model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[:, -1]


@torch.inference_mode()
def step(cache, token):
    """The same by the engine's forward pass, in a third of the time."""
    return model.lm_head(runner.forward(torch.tensor([[token]]), cache))


def state_of(length):
    cache = state.new_cache(config)
    run(cache, PROMPT[:length])
    return cache


caches = {length: state_of(length) for length in LENGTHS}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class StateTestCase(unittest.TestCase):
    def assertSameState(self, one, other):
        (tensors, counts), (expected_tensors, expected_counts) = state.tensors_of(one), state.tensors_of(other)
        self.assertEqual(counts, expected_counts)
        self.assertEqual(shapes(tensors), shapes(expected_tensors))
        for name, tensor in tensors.items():
            self.assertTrue(torch.equal(tensor, expected_tensors[name]), name)


class TestExpected(StateTestCase):
    def test_is_what_the_model_holds_at_every_length(self):
        for length, cache in caches.items():
            with self.subTest(length=length):
                tensors, counts = state.tensors_of(cache)
                self.assertEqual(state.expected(config, length), (shapes(tensors), counts))
                state.check(config, length, tensors, counts)

    def test_is_the_same_after_single_steps_as_after_one_prefill(self):
        cache = state.new_cache(config)
        for length in range(1, 141):
            run(cache, PROMPT[length - 1 : length])
            tensors, counts = state.tensors_of(cache)
            self.assertEqual(state.expected(config, length), (shapes(tensors), counts), length)

    def test_names_what_the_issue_lists(self):
        names = set(state.expected(config, 513)[0])
        csa = [f"{part}.{name}" for part in ("compressor", "indexer") for name in (
            "compressed_kv", "buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate")]  # fmt: skip
        hca = [f"compressor.{name}" for name in ("compressed_kv", "buffer_kv", "buffer_gate")]
        pieces = {"sliding_attention": [], "compressed_sparse_attention": csa, "heavily_compressed_attention": hca}
        self.assertEqual(set(pieces), set(config.layer_types))
        layers = [(i, piece) for i, kind in enumerate(config.layer_types) for piece in ["window", *pieces[kind]]]
        self.assertEqual(names, {f"layers.{i}.{piece}" for i, piece in layers})

    def test_every_tensor_of_the_live_cache_is_among_them(self):
        for length in (1, 513):
            sent = state.tensors_of(caches[length])[0].values()
            for index, layer in enumerate(caches[length].layers):
                for name, value in vars(layer).items():
                    if name == "_sliding_window_tensor":  # the window's size, from the config
                        continue
                    for part in value.values() if isinstance(value, dict) else [value]:
                        if isinstance(part, torch.Tensor) and part.numel():
                            with self.subTest(length=length, layer=index, name=name):
                                self.assertTrue(any(torch.equal(part, tensor) for tensor in sent))


class TestRestore(StateTestCase):
    def test_is_the_inverse_of_tensors_of_and_goes_on_bit_for_bit(self):
        for length, cache in caches.items():
            with self.subTest(length=length):
                restored = state.restore(config, *state.tensors_of(cache))
                self.assertSameState(restored, cache)
                original = state.snapshot(cache)
                for token in (11, 12, 13, 14, 15):
                    self.assertTrue(torch.equal(step(restored, token), step(original, token)))
                self.assertSameState(restored, original)


class TestCheck(StateTestCase):
    def refusal(self, tensors, counts, length=513):
        with self.assertRaises(state.StateError) as caught:
            state.check(config, length, tensors, counts)
        return str(caught.exception)

    def test_names_each_missing_tensor_and_count(self):
        tensors, counts = state.tensors_of(caches[513])
        for name in tensors:
            message = self.refusal({key: value for key, value in tensors.items() if key != name}, counts)
            self.assertIn(f"state of 513 tokens: tensor {name} is missing", message)
        for name in counts:
            message = self.refusal(tensors, {key: value for key, value in counts.items() if key != name})
            self.assertIn(f"state of 513 tokens: count {name} is missing", message)

    def test_names_each_tensor_of_another_shape_or_type_and_each_other_count(self):
        tensors, counts = state.tensors_of(caches[513])
        for name, tensor in tensors.items():
            longer = torch.cat([tensor, tensor[..., :1, :]], -2)
            message = self.refusal(tensors | {name: longer}, counts)
            self.assertIn(f"tensor {name} is {tuple(longer.shape)}", message)
            self.assertIn(f"expected {tuple(tensor.shape)}", message)
            self.assertIn(f"tensor {name} is torch.bfloat16", self.refusal(tensors | {name: tensor.bfloat16()}, counts))
        for name, count in counts.items():
            message = self.refusal(tensors, counts | {name: count - 1})
            self.assertIn(f"count {name} is {count - 1}, expected {count}", message)

    def test_names_what_does_not_belong(self):
        tensors, counts = state.tensors_of(caches[513])
        extra = tensors | {"layers.0.compressor.overlap_kv": torch.zeros(1, 4, 32)}
        self.assertIn("layers.0.compressor.overlap_kv is (1, 4, 32), expected none", self.refusal(extra, counts))
        refusal = self.refusal(tensors, counts | {"layers.9.cumulative_length": 1})
        self.assertIn("count layers.9.cumulative_length", refusal)

    def test_refuses_the_state_of_another_length(self):
        for length, other in ((3, 4), (4, 5), (128, 129), (512, 513), (513, 512)):
            with self.subTest(length=length, other=other):
                self.assertIn(f"state of {other} tokens", self.refusal(*state.tensors_of(caches[length]), other))


class TestSnapshot(StateTestCase):
    def test_does_not_see_what_happens_to_the_original_nor_the_other_way_round(self):
        for length in LENGTHS:
            with self.subTest(length=length):
                before = state.restore(config, *state.tensors_of(caches[length]))
                original = state.snapshot(caches[length])
                twin = state.snapshot(original)
                for token in range(5):
                    step(original, token)
                self.assertSameState(twin, before)
                reference = state.snapshot(original)
                for token in range(10, 15):
                    step(twin, token)
                self.assertSameState(original, reference)


class TestGather(StateTestCase):
    @staticmethod
    def batch(length, rows):
        """A cache of `rows` different sequences of one length."""
        cache = state.new_cache(config)
        ids = [[(token + 7 * row) % config.vocab_size for token in PROMPT[:length]] for row in range(rows)]
        with torch.inference_mode():
            model(input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True)
        return cache

    def test_takes_the_chosen_rows_of_each_part_in_order(self):
        for length in (1, 3, 4, 33, 129):
            with self.subTest(length=length):
                one, other = self.batch(length, 3), self.batch(length, 2)
                gathered = state.gather([(one, [2, 0]), (other, [1])])
                for row, (part, source) in enumerate(((one, 2), (one, 0), (other, 1))):
                    self.assertSameState(state.gather([(gathered, [row])]), state.gather([(part, [source])]))

    def test_pads_with_the_last_row(self):
        part = self.batch(33, 3)
        gathered = state.gather([(part, [0, 1])], multiple=4)
        self.assertEqual(gathered.layers[0].keys.shape[0], 4)
        for row in (1, 2, 3):
            self.assertSameState(state.gather([(gathered, [row])]), state.gather([(part, [1])]))
        self.assertEqual(state.gather([(part, [0, 1])], multiple=2).layers[0].keys.shape[0], 2)

    def test_leaves_its_parts_alone(self):
        part = self.batch(33, 2)
        before = [state.restore(config, *state.tensors_of(state.gather([(part, [row])]))) for row in (0, 1)]
        gathered = state.gather([(part, [0, 1])], multiple=4)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[1], [2], [3], [4]]), past_key_values=gathered, use_cache=True)
        for row in (0, 1):
            self.assertSameState(state.gather([(part, [row])]), before[row])

    def test_refuses_rows_of_different_lengths(self):
        with self.assertRaisesRegex(AssertionError, "different lengths"):
            state.gather([(caches[32], [0]), (caches[33], [0])])


def prompt(length, seed=0):
    return torch.randint(10, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefill(ids, runner=runner, cache=None, keep_from=None, prefix_cache=None):
    """(logits [m, V] from position `keep_from` on, by default the last; the state after `ids`)."""
    cache = cache or state.new_cache(model.config)
    keep_from = len(ids) - 1 if keep_from is None else keep_from
    logits = []
    while cache.get_seq_length() < len(ids):
        logits.append(runner.prefill_step(ids, cache, keep_from))
        if prefix_cache is not None:
            prefix_cache.insert(ids, cache)
    return torch.cat(logits), cache


def decode(token, cache):
    """(logits [V] after `token`, the state after it) of one sequence alone."""
    batch = gather_rows([(cache, [0])])
    return runner.decode_step([token] * ROWS, batch)[0], batch


def cache_row(cache, row=0):
    return state.gather([(cache, [row])])


class TestAgainstTransformers(StateTestCase):
    def test_a_norm_of_any_width(self):
        for width in (96, 128):
            x = torch.arange(1.0, width + 1).unsqueeze(0)
            expected = (x.square().mean(-1, keepdim=True) + 0.5).rsqrt()
            torch.testing.assert_close(_scale(x, torch.tensor(0.5)), expected)

    @torch.inference_mode()
    def test_chunks_and_steps_give_the_logits_of_one_forward_over_everything(self):
        for length, chunk in ((150, 128), (300, 128), (300, 37), (40, 1), (1, 128), (120, 128)):
            with self.subTest(length=length, chunk=chunk):
                ids = prompt(length + 20)
                whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                logits, cache = prefill(ids[:length], ModelRunner(model, chunk), keep_from=0)
                torch.testing.assert_close(logits, whole[:length], rtol=1e-3, atol=1e-3)
                for position in range(length, length + 20):
                    step, cache = decode(ids[position], cache)
                    torch.testing.assert_close(step, whole[position], rtol=1e-3, atol=1e-3)
                (tensors, counts), expected = (state.tensors_of(each) for each in (cache_row(cache), prefill(ids)[1]))
                self.assertEqual(counts, expected[1])
                torch.testing.assert_close(tensors, expected[0], rtol=1e-3, atol=1e-3)

    def test_greedy_tokens_are_those_of_generate(self):
        for length in (1, 4, 33, 129, 260):
            with self.subTest(length=length):
                ids = prompt(length)
                greedy = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
                generated = model.generate(torch.tensor([ids]), **greedy)
                logits, cache = prefill(ids)
                tokens = [int(logits[-1].argmax())]
                while len(tokens) < 40:
                    logits, cache = decode(tokens[-1], cache)
                    tokens.append(int(logits.argmax()))
                self.assertEqual(tokens, generated[0, length:].tolist())


class TestBatchInvariance(StateTestCase):
    def test_a_row_does_not_depend_on_its_neighbours_their_number_nor_its_place(self):
        for length in (3, 33, 127, 128, 300):
            sequences = [prompt(length, seed) for seed in range(6)]
            states = [prefill(ids)[1] for ids in sequences]
            alone = [decode(ids[0], cache) for ids, cache in zip(sequences, states)]
            for count in (1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64):
                order = [(3 * row + count) % 6 for row in range(count)]
                batch = gather_rows([(states[index], [0]) for index in order])
                tokens = [sequences[index][0] for index in order]
                logits = runner.decode_step(tokens + tokens[-1:] * (-len(tokens) % ROWS), batch)
                for row, index in enumerate(order):
                    with self.subTest(length=length, count=count, row=row):
                        expected, expected_state = alone[index]
                        self.assertTrue(torch.equal(logits[row], expected))
                        self.assertSameState(state.gather([(batch, [row])]), state.gather([(expected_state, [0])]))

    @unittest.skipUnless(torch.backends.mkl.is_available(), "this torch has no MKL")
    def test_mkl_is_in_its_strict_mode(self):
        """It prints so itself, where C prints: also in a process that was forked after torch had been imported."""
        with tempfile.TemporaryFile() as printed:
            before = os.dup(1)
            os.dup2(printed.fileno(), 1)
            try:
                with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
                    torch.mm(torch.ones(ROWS, 16), torch.ones(16, 16))
                ctypes.CDLL(None).fflush(None)
            finally:
                os.dup2(before, 1)
                os.close(before)
            printed.seek(0)
            self.assertRegex(printed.read().decode(), "SGEMM.* CNR:AUTO,STRICT ")

    def test_refuses_a_ragged_batch(self):
        cache = prefill(prompt(5))[1]
        with self.assertRaises(AssertionError):
            runner.decode_step([1] * (ROWS - 1), cache)


class TestPrefixCache(StateTestCase):
    def test_going_on_from_a_snapshot_is_bit_equal_to_a_cold_start(self):
        for chunk in (128, 48):
            chunked = ModelRunner(model, chunk)
            prefix_cache = PrefixCache(chunk)
            first = prompt(400)
            prefill(first, chunked, prefix_cache=prefix_cache)
            for shared in (0, chunk - 1, chunk, chunk + 1, 2 * chunk, 400):
                for length in (shared + 1, shared + 140):
                    with self.subTest(chunk=chunk, shared=shared, length=length):
                        ids = first[:shared] + prompt(length - min(shared, 400), seed=9)
                        cold_logits, cold = prefill(ids, chunked)
                        found = prefix_cache.match(ids, len(ids) - 1)
                        cached = found.get_seq_length() if found else 0
                        self.assertEqual(cached, min(shared, len(ids) - 1) // chunk * chunk)
                        logits, warm = prefill(ids, chunked, cache=found)
                        self.assertTrue(torch.equal(logits, cold_logits))
                        self.assertSameState(warm, cold)

    def test_a_snapshot_holds_no_more_of_the_window_than_it_says(self):
        _, cache = prefill(prompt(400))
        for layer in cache.layers:
            self.assertEqual(layer.keys.untyped_storage().nbytes(), layer.keys.nbytes)

    @staticmethod
    def stub(length):
        return SimpleNamespace(get_seq_length=lambda: length, layers=[], length=length)

    def test_finds_the_longest_prefix_within_the_limit(self):
        cache, ids = PrefixCache(4), list(range(20))
        for length in (4, 8, 12):
            cache.insert(ids, self.stub(length))
        for limit, expected in ((3, None), (4, 4), (7, 4), (8, 8), (11, 8), (12, 12), (19, 12)):
            with self.subTest(limit=limit):
                found = cache.match(ids, limit)
                self.assertEqual(found and found.length, expected)
        self.assertIsNone(cache.match([99, *ids[1:]], 19))
        self.assertEqual(cache.match([*ids[:8], 99, 99, 99, 99], 12).length, 8)

    def test_keeps_only_what_ends_on_a_chunk(self):
        cache = PrefixCache(4)
        cache.insert(list(range(20)), self.stub(6))
        self.assertEqual(len(cache), 0)

    def test_keys_do_not_meet(self):
        cache, ids = PrefixCache(4), list(range(8))
        cache.insert(ids, self.stub(4), extra_key="one")
        self.assertIsNone(cache.match(ids, 7))
        self.assertIsNone(cache.match(ids, 7, extra_key="other"))
        self.assertEqual(cache.match(ids, 7, extra_key="one").length, 4)

    def test_the_least_recently_used_goes_first(self):
        cache = PrefixCache(1, capacity=2)
        for token in (1, 2):
            cache.insert([token], self.stub(1))
        cache.match([1], 1)
        cache.insert([3], self.stub(1))
        self.assertEqual(len(cache), 2)
        self.assertEqual([cache.match([token], 1) is not None for token in (1, 2, 3)], [True, False, True])

    def test_clear(self):
        cache = PrefixCache(1)
        cache.insert([1], self.stub(1))
        cache.clear()
        self.assertEqual((len(cache), cache.match([1], 1)), (0, None))


class TestScheduler(StateTestCase):
    def serve(self, requests, prefix_cache=None, runner=runner):
        """Run all to their end, on a scheduler of their own; returns its counters."""
        finished = threading.Semaphore(0)
        for request in requests:
            request.notify = lambda request=request: request.finish_reason and finished.release()
        scheduler = Scheduler(runner, prefix_cache)
        for request in requests:
            scheduler.generate(request)
        scheduler.start()
        for _ in requests:
            self.assertTrue(finished.acquire(timeout=60))
        return scheduler.counters

    @staticmethod
    def request(ids, tokens=20, **options):
        params = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
        return Request(ids, params, tokenizer, frozenset({1}), return_logprob=True, **options)

    def test_company_changes_neither_tokens_nor_logprobs(self):
        prompts = [prompt(length, length) for length in (1, 3, 4, 5, 31, 32, 33, 127, 128, 129)]
        alone = []
        for ids in prompts:
            request = self.request(ids)
            self.serve([request])
            alone.append(request.output_logprobs)
        for order in (prompts, prompts[::-1]):
            requests = [self.request(ids) for ids in order]
            self.serve(requests, PrefixCache(128))
            expected = alone if order is prompts else alone[::-1]
            self.assertEqual([request.output_logprobs for request in requests], expected)

    def test_a_shorter_sequence_steps_first_and_joins_the_longer_one(self):
        counters = self.serve([self.request(prompt(10), tokens=20), self.request(prompt(4), tokens=26)])
        self.assertEqual(counters.decode_tokens, 19 + 25)
        self.assertEqual(counters.decode_steps, 25)

    def test_sequences_of_one_length_share_every_step(self):
        counters = self.serve([self.request(prompt(10, seed), tokens=5) for seed in range(20)])
        self.assertEqual((counters.decode_tokens, counters.decode_steps), (20 * 4, 4))
        self.assertEqual(counters.prefill_tokens, 20 * 10)

    def test_a_cached_prefix_is_not_prefilled_again(self):
        ids, prefix_cache = prompt(300), PrefixCache(128)
        first, second = self.request(ids), self.request(ids)
        counters = self.serve([first], prefix_cache)
        self.assertEqual((first.cached_tokens, counters.prefill_tokens), (0, 300))
        counters = self.serve([second], prefix_cache)
        self.assertEqual((second.cached_tokens, counters.prefill_tokens), (256, 44))
        self.assertEqual(first.output_logprobs, second.output_logprobs)

    def test_a_failure_on_the_torch_thread_ends_the_process(self):
        ended = threading.Event()
        broken = SimpleNamespace(config=model.config, prefill_step=None)
        leaving = mock.patch("os._exit", side_effect=lambda code: ended.set())
        with leaving as leave, contextlib.redirect_stderr(io.StringIO()) as log:
            scheduler = Scheduler(broken)
            scheduler.generate(self.request(prompt(3)))
            scheduler.start()
            self.assertTrue(ended.wait(10))
        leave.assert_called_once_with(1)
        self.assertRegex(log.getvalue(), "Traceback(.|\n)*the torch thread failed; the server ends")

    def test_logits_that_are_not_finite_end_their_request_and_no_other(self):
        class Corrupt:
            config = model.config

            def prefill_step(self, ids, cache, keep_from):
                logits = runner.prefill_step(ids, cache, keep_from)
                return logits * math.nan if ids[0] == 11 else logits

            def decode_step(self, tokens, cache):
                logits = runner.decode_step(tokens, cache).clone()
                logits[1] = math.nan
                return logits

        ids = prompt(10)
        for corrupt in ([10, *ids], [11, *ids]):
            sound, ended = self.request([12, *ids], tokens=4), self.request(corrupt, tokens=4)
            self.serve([sound, ended], runner=Corrupt())
            self.assertEqual((sound.finish_reason["type"], len(sound.output_ids)), ("length", 4))
            self.assertEqual((ended.finish_reason["status_code"], len(ended.output_ids)), (500, 11 - corrupt[0]))

    def test_prefill_hands_over_nothing_that_it_could_not_compute(self):
        broken = SimpleNamespace(config=model.config, prefill_step=lambda ids, cache, _: torch.full((1, 9), math.nan))
        scheduler, handed_over, done = Scheduler(broken), [], threading.Event()
        request = self.request(prompt(3))
        with mock.patch.object(state, "new_cache", lambda config: SimpleNamespace(get_seq_length=lambda: 3)):
            scheduler.prefill(request, lambda _, cache: (handed_over.append(cache), done.set()))
            scheduler.start()
            self.assertTrue(done.wait(10))
        self.assertEqual((handed_over, request.finish_reason["status_code"]), ([None], 500))

    def test_prompt_logprobs_are_complete_whatever_their_start(self):
        ids = prompt(300)
        everything = self.request(ids, tokens=1, logprob_start_len=0)
        self.serve([everything])
        self.assertEqual([token for _, token in everything.input_logprobs], ids)
        self.assertIsNone(everything.input_logprobs[0][0])
        for start in (1, 127, 128, 129, 256, 298, 299, 300):
            with self.subTest(start=start):
                request = self.request(ids, tokens=1, logprob_start_len=start)
                self.serve([request])
                self.assertEqual([token for _, token in request.input_logprobs], ids[start:])
                pairs = zip(request.input_logprobs[1:], everything.input_logprobs[start + 1 :])
                for (logprob, _), (expected, _) in pairs:
                    self.assertAlmostEqual(logprob, expected, places=3)


if __name__ == "__main__":
    unittest.main()
