"""The state that is transferred: all of it, bit for bit, and nothing that does not belong."""

import unittest
from pathlib import Path

import pdkit
import torch
from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine import state
from pdkit.models.cpu.model import load_model

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

RANDOM = Path(pdkit.__file__).parent / "assets" / "random-dsv4"
LENGTHS = (1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 512, 513, 700)

torch.set_num_threads(1)
model = load_model(RANDOM, load_format="dummy", seed=7)
config = model.config
PROMPT = torch.randint(config.vocab_size, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(0)).tolist()[0]


@torch.inference_mode()
def run(cache, ids):
    """Logits [1, V] after `ids`, which `cache` takes up."""
    return model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[:, -1]


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
                    self.assertTrue(torch.equal(run(restored, [token]), run(original, [token])))
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
                    run(original, [token])
                self.assertSameState(twin, before)
                reference = state.snapshot(original)
                for token in range(10, 15):
                    run(twin, [token])
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


if __name__ == "__main__":
    unittest.main()
