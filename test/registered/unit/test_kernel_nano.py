"""The kernel-sized model: configuration, fp8 checkpoint and back, MTP, training's losses, truth, the one-GPU plan."""

import contextlib
import json
import os
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from cases import FolderCase, printed
from pdkit.checks.reference.truth import LogprobTruth, fp8_rounding, logprobs
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import NotReady
from pdkit.core.paths import ASSETS
from pdkit.models.cpu.evaluation import WINDOW, Score, validation
from pdkit.models.cpu.model import ModelError
from pdkit.models.cuda import checkpoint, store, training
from pdkit.models.cuda import fit as fitting
from pdkit.models.cuda.config import DEEPEP_HIDDEN, FEW_HEADS, FIELDS, fields
from pdkit.models.cuda.fp8 import dequantize_blocks, quantize_blocks, round_groups
from pdkit.models.cuda.model import KernelNano, randomize, reference_config, rescale
from pdkit.models.problems import evaluation_set, few_shot
from pdkit.models.tokenizer import nano_tokenizer
from pdkit.preflight.contract.launches import ask, ask_each
from pdkit.preflight.contract.release import installed
from pdkit.preflight.plan import of_contract
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

register_cpu_ci(est_time=18, suite="stage-a-test-cpu")


def kernel_tokenizer():
    """As each kernel-sized checkpoint has it."""
    return AutoTokenizer.from_pretrained(ASSETS / "few-heads-dsv4", local_files_only=True)


ONE_GPU = Path(__file__).parents[1] / "distributed" / "test_disaggregation_dsv4_1gpu.py"


class TestConfig(FolderCase):
    def test_what_the_kernels_fix(self):
        self.assertEqual((FIELDS["num_attention_heads"], FIELDS["head_dim"], FIELDS["qk_rope_head_dim"]), (64, 512, 64))
        self.assertEqual((FIELDS["index_head_dim"], FIELDS["sliding_window"], FIELDS["hc_mult"]), (128, 128, 4))
        self.assertIn(FIELDS["index_n_heads"], (32, 64))
        self.assertIn(FIELDS["index_topk"], (512, 1024))
        for name in ("hidden_size", "moe_intermediate_size", "q_lora_rank", "o_lora_rank"):
            self.assertEqual(FIELDS[name] % 128, 0, name)
        self.assertEqual(len(FIELDS["compress_ratios"]), FIELDS["num_hidden_layers"] + 1)
        self.assertEqual({0, 4, 128}, set(FIELDS["compress_ratios"]))

    def test_the_wide_one_is_what_deepep_moves_and_four_ranks_share(self):
        wide = fields(DEEPEP_HIDDEN)
        self.assertEqual({name for name in wide if wide[name] != FIELDS[name]},
                         {"hidden_size", "intermediate_size", "moe_intermediate_size"})  # fmt: skip
        self.assertEqual((wide["hidden_size"], wide["moe_intermediate_size"] % (4 * 128)), (2048, 0))
        self.assertEqual(reference_config(wide).moe_intermediate_size, 512)

    def test_the_one_that_is_served_on_cpu_too(self):
        """bfloat16 linear layers, the KV pages of the others, and what a GPU's kernels take: heads are padded to 64."""
        same = "head_dim", "qk_rope_head_dim", "index_head_dim", "sliding_window", "hc_mult", "compress_ratios"
        self.assertEqual({name: FEW_HEADS[name] for name in same}, {name: FIELDS[name] for name in same})
        self.assertNotIn("quantization_config", FEW_HEADS)
        self.assertIn(FEW_HEADS["index_n_heads"], (32, 64))
        self.assertGreaterEqual(FEW_HEADS["vocab_size"], len(kernel_tokenizer()))
        model = KernelNano(FEW_HEADS)
        path = checkpoint.save(model, self.root)
        self.assertLess((path / store.WEIGHTS).stat().st_size, 10e6)
        self.assertEqual(json.loads((path / "config.json").read_text()), FEW_HEADS)
        read = checkpoint.load(path)
        for name, before in model.state_dict().items():
            torch.testing.assert_close(read.state_dict()[name], before, rtol=2**-8, atol=0, msg=name)

    def test_rope_is_stretched_nowhere(self):
        self.assertEqual(FIELDS["rope_scaling"]["factor"], 1.0)
        for rope in reference_config(FIELDS).rope_parameters.values():
            self.assertEqual(rope["rope_type"], "default")

    def test_the_reference_is_the_same_model(self):
        main, mtp = reference_config(FIELDS), reference_config(FIELDS, mtp=True)
        kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
        self.assertEqual((main.layer_types, main.mlp_layer_types), (kinds, ["hash_moe", "moe", "moe"]))
        self.assertEqual((mtp.layer_types, mtp.mlp_layer_types), (["sliding_attention"], ["moe"]))
        self.assertEqual((main.qk_rope_head_dim, main.index_topk, main.hc_sinkhorn_iters), (64, 512, 20))


class TestFp8(unittest.TestCase):
    def setUp(self):
        self.weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
        self.weight[:128, :128] *= 1000

    def test_scales_are_powers_of_two_and_each_block_has_its_own(self):
        _, scale = quantize_blocks(self.weight)
        self.assertEqual(scale.shape, (2, 3))
        self.assertTrue(torch.equal(scale.log2(), scale.log2().round()))
        self.assertGreater(scale[0, 0], 100 * scale[0, 1])

    def test_values_are_rounded_by_half_a_step_of_three_bits(self):
        found = dequantize_blocks(*quantize_blocks(self.weight))
        error = (found - self.weight).abs() / self.weight.abs()
        large = self.weight.abs() > 0.1
        self.assertLessEqual(error[large].max().item(), 2**-4)
        self.assertGreater(error[large].max().item(), 2**-5)

    def test_what_was_stored_is_stored_again(self):
        found = dequantize_blocks(*quantize_blocks(self.weight))
        self.assertTrue(torch.equal(dequantize_blocks(*quantize_blocks(found)), found))

    def test_groups_have_scales_of_their_own(self):
        x = torch.cat([torch.full((2, 128), 1e-3), torch.full((2, 128), 1e3)], dim=1) * 1.01
        torch.testing.assert_close(round_groups(x), x, rtol=2**-4, atol=0)
        self.assertEqual(round_groups(x.bfloat16()).dtype, torch.bfloat16)


class TestModel(FolderCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.model = KernelNano()
        randomize(cls.model, seed=3)
        cls.path = checkpoint.save(cls.model, Path(folder, "random"))
        cls.read = checkpoint.load(cls.path)
        text = few_shot(evaluation_set(4))
        cls.ids = training.tokenizer()(text).input_ids[:128]

    def test_read_back_is_what_was_written_but_for_rounding(self):
        states = self.model.state_dict(), self.read.state_dict()
        self.assertEqual(*(set(state) for state in states))
        for name, before in states[0].items():
            after = states[1][name]
            largest = before.abs().max().item()
            self.assertLessEqual((before - after).abs().max().item(), largest * 2**-4, name)
        self.assertEqual(checkpoint.tensors_of(self.read)["layers.0.attn.wq_b.weight"].dtype, torch.float8_e4m3fn)

    def test_names_are_those_that_transformers_gives_a_checkpoint(self):
        self.read.main.save_pretrained(self.root)
        saved = load_file(self.root / "model.safetensors")
        theirs = {}
        for name, tensor in saved.items():  # three names that transformers 5 does not turn back
            name = name.removeprefix("model.").replace("hc_head.hc_", "hc_head_").replace("embed_tokens.", "embed.")
            theirs[name.replace(".attn.norm.", ".attn.kv_norm.")] = tensor
        stored = load_file(self.path / store.WEIGHTS)
        ours = {name for name in stored if not name.endswith(".scale") or "hc_" in name}
        self.assertEqual({name for name in ours if not name.startswith("mtp.")}, set(theirs))
        for name, tensor in theirs.items():
            found = stored[name]
            if found.dtype is torch.float8_e4m3fn:
                found = dequantize_blocks(found, stored[f"{name.removesuffix('.weight')}.scale"])
            self.assertTrue(torch.equal(found.float(), tensor.float()), name)

    def test_the_mtp_layer_is_stored(self):
        names = {name for name in load_file(self.path / store.WEIGHTS) if name.startswith("mtp.0.")}
        for name in ("e_proj.scale", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight", "hc_head_fn",
                     "attn.wkv.scale", "ffn.gate.bias", "ffn.experts.3.w2.weight"):  # fmt: skip
            self.assertIn(f"mtp.0.{name}", names)
        self.assertFalse([name for name in names if "compressor" in name or "tid2eid" in name])

    def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(self):
        stored = load_file(self.path / store.WEIGHTS)
        self.write("config.json", json.dumps(FIELDS))
        lacking = {name: tensor for name, tensor in stored.items() if name != "mtp.0.e_proj.scale"}
        for tensors, reason in (
            (lacking, "mtp.0.e_proj.weight"),
            (stored | {"more": torch.ones(1)}, "more is unknown"),
            (stored | {"embed.weight": torch.ones(1024, 256)}, "embed.weight is missing or of another shape"),
        ):
            with self.subTest(reason):
                save_file(tensors, self.root / store.WEIGHTS)
                with self.assertRaisesRegex(ModelError, reason) as caught:
                    checkpoint.load(self.root)
                self.assertNotIn("\n", str(caught.exception))

    def test_logits_are_those_of_transformers(self):
        ids = torch.tensor([self.ids])
        with torch.no_grad():
            ours, _ = self.read(ids)
            theirs = self.read.main(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_the_draft_sees_the_next_token_and_no_later_one(self):
        ids = torch.tensor([self.ids])
        changed = ids.clone()
        changed[0, 60] = (changed[0, 60] + 1) % 500
        with torch.no_grad():
            before, after = (self.read(each)[1][0] for each in (ids, changed))
        moved = (before != after).any(-1).nonzero().squeeze(1).tolist()
        self.assertEqual(moved[0], 59)

    def test_rounding_is_within_its_own_tolerance_and_a_wrong_weight_is_not(self):
        exact = tuple(logprobs(self.read, self.ids))
        with fp8_rounding(self.read):
            rounded = tuple(logprobs(self.read, self.ids))
        self.assertEqual(tuple(logprobs(self.read, self.ids)), exact)
        truth = LogprobTruth(exact, rounded, rounded)
        self.assertGreater(truth.expected, 1e-4)
        truth.assert_passed()
        sinks = self.read.main.model.layers[1].self_attn.sinks
        kept = sinks.clone()
        with torch.no_grad():
            sinks.fill_(50.0)  # attention of one layer is lost
            wrong = tuple(logprobs(self.read, self.ids))
            sinks.copy_(kept)
        with self.assertRaisesRegex(AssertionError, "FAIL, 127 positions"):
            LogprobTruth(exact, rounded, wrong).assert_passed()

    def test_a_wide_matrix_starts_as_quiet_as_a_narrow_one(self):
        model = KernelNano()
        before = model.main.model.layers[0].self_attn.o_a_proj.weight.std().item()
        rescale(model)
        after = model.main.model.layers[0].self_attn.o_a_proj.weight.std().item()
        self.assertAlmostEqual(after / before, (128 / 4096) ** 0.5, places=4)


class TestTokenizer(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tokenizer, cls.nano = kernel_tokenizer(), nano_tokenizer()

    def test_ids_are_those_that_training_saw(self):
        text = few_shot(evaluation_set(3))
        self.assertEqual(self.tokenizer(text).input_ids, self.nano(text).input_ids)
        chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        ours, theirs = (each.apply_chat_template(chat)["input_ids"] for each in (self.tokenizer, self.nano))
        self.assertEqual(ours, theirs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self.assertEqual(getattr(self.tokenizer, name), getattr(self.nano, name))
        self.assertLess(max(self.tokenizer.get_vocab().values()), FIELDS["vocab_size"])

    def test_sglang_makes_chats_with_it(self):
        """Its server ends when it starts where DeepSeek-V4's special tokens are missing (0.5.23)."""
        try:
            from sglang.srt.entrypoints.openai import chat_encoding_adapters as adapters
        except ImportError:
            self.skipTest("this release makes chats by the checkpoint's template")
        hooks = "thinking_requested", "tool_call_parsing_active", "history_tool_calls_count", "tool_call_id"
        for tokenizer in (self.tokenizer, self.nano):
            context = adapters.ChatEncodingAdapterContext(
                chat_encoding_spec="dsv4", tokenizer=tokenizer, chat_hooks=adapters.ChatOutputHooks(**dict.fromkeys(hooks)),
                model_path="", **dict.fromkeys(("reasoning_parser", "tool_call_parser", "hf_config", "revision")),
            )  # fmt: skip
            if tokenizer is self.tokenizer:
                self.assertIsNotNone(adapters.build_chat_encoding_adapter(context))
            else:
                with self.assertRaisesRegex(RuntimeError, "special token"):
                    adapters.build_chat_encoding_adapter(context)


class TestTraining(unittest.TestCase):
    def test_main_is_asked_for_the_next_token_and_mtp_for_the_one_after(self):
        ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
        sure = [100.0 * torch.nn.functional.one_hot(ids.roll(-ahead, 1), 50) for ahead in (1, 2)]
        records = SimpleNamespace(recording=contextlib.nullcontext, loss=lambda: torch.zeros(()))
        weights = torch.ones(ids.shape)
        for logits, right in (((sure[0], sure[1]), True), ((sure[1], sure[0]), False)):
            found = training.losses(lambda *_, pair=logits, **__: pair, records, ids, weights)[:2]
            for loss in found:
                self.assertEqual(loss.item() < 1e-3, right)

    def test_the_time_is_shared_out_and_the_sinkhorn_iterations_are_those_served_in_the_end(self):
        self.assertAlmostEqual(sum(stage.share for stage in training.STAGES), 1)
        self.assertIsNone(training.STAGES[-1].sinkhorn)
        for stage in training.STAGES:
            self.assertEqual(stage.length % WINDOW, 0)

    def test_only_wide_matrices_learn_slowly(self):
        model = torch.nn.Module()
        model.wide, model.narrow = torch.nn.Linear(4096, 8, bias=False), torch.nn.Linear(128, 8)
        groups = training.optimizer_of(model).param_groups
        scales = {tuple(p.shape): group["scale"] for group in groups for p in group["params"]}
        self.assertEqual(scales, {(8, 4096): 128 / 4096, (8, 128): 1.0, (8,): 1.0})

    def test_validation_is_neither_trained_on_nor_evaluated(self):
        problems, shots = validation(8, 0)
        evaluated = {problem.key for problem in evaluation_set(8)}
        self.assertEqual((len(problems), len(shots)), (8, 5))
        self.assertTrue(evaluated - {problem.key for problem in problems})


class TestFitting(FolderCase):
    """All but the arithmetic: what is kept, shown and recorded."""

    def fit(self, *seconds):
        """Trains as if steps ended at these times, saving each 30 s; what was printed."""
        self.out = self.write(f"trained/{store.RECORD}", "{}").parent
        stage = training.STAGES[0]
        steps = [training.TimedProgress(stage, at, 100, time, 1, 1, 1, 1) for at, time in enumerate(seconds, 1)]
        options = SimpleNamespace(
            device="cpu", seconds=60, save_every=30, seed=0, hidden_size=128, few_heads=False, workers=1, score_rows=1,
            out=self.out,
        )  # fmt: skip
        with (
            mock.patch.object(fitting, "train", lambda *_: iter(steps)),
            mock.patch.object(fitting, "score", lambda *_: Score(1, 0.5, 0.75)),
            mock.patch.object(fitting, "BatchQueue"),
            mock.patch.object(fitting.checkpoint, "save", wraps=checkpoint.save) as self.save,
        ):
            return printed(fitting.run, options).out

    def test_what_is_recorded_is_what_was_read_back(self):
        shown = self.fit(1.0, 12.0, 15.0, 40.0)
        record = json.loads((self.out / store.RECORD).read_text())
        self.assertEqual((record["steps"], record["solved"], record["drafts right"]), (4, 0.5, 0.75))
        self.assertTrue(store.is_trained(self.out))
        self.assertEqual(self.save.call_count, 2, "after 30 s, and at the end")
        self.assertEqual(shown.count("held out, 5 shots: solved 0.50"), 3, "at first, and then each 10 s")

    def test_a_machine_without_gpu(self):
        with mock.patch.object(torch.cuda, "is_available", lambda: False), self.assertRaises(NotReady):
            fitting.run(SimpleNamespace(device="cuda"))

    def test_what_is_interrupted_does_not_pass_for_trained(self):
        with mock.patch.object(fitting, "fit", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            self.fit()
        self.assertFalse(store.is_trained(self.out))


class TestCache(FolderCase):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.dict(os.environ, PDKIT_CACHE_DIR=str(self.root)))
        self.path = store.cached("trained")
        self.path.mkdir(parents=True)
        (self.path / "config.json").write_text("{}")
        (self.path / store.WEIGHTS).write_bytes(b"weights")

    def record(self, digest):
        (self.path / store.RECORD).write_text(json.dumps({"sha256": digest}))

    def test_the_trained_model_is_preferred_once_it_is_recorded(self):
        self.assertEqual(store.best(), store.cached("random"))
        self.assertEqual(store.best(DEEPEP_HIDDEN).name, "random-2048")
        self.record(store.digest(self.path))
        self.assertEqual(store.best(), self.path)
        self.assertTrue(store.is_trained(self.path))
        self.assertFalse(store.is_trained(store.cached("random")))

    def test_weights_that_are_not_those_of_the_record_are_refused(self):
        self.record(store.digest(self.path))
        (self.path / store.WEIGHTS).write_bytes(b"other weights")
        with self.assertRaisesRegex(store.DamagedCheckpoint, "remove it and train again"):
            store.is_trained(self.path)

    def test_only_the_random_model_is_made_where_it_is_missing(self):
        with mock.patch.object(store.subprocess, "run") as run:
            store.provide("/somewhere/else")
            run.assert_not_called()
            store.provide(store.cached("random"))
            words = ["-m", "pdkit", "model", "kernel-random", "--hidden-size", "128"]
            self.assertEqual(run.call_args.args[0][1:], words)
            store.provide(store.cached("random", DEEPEP_HIDDEN))
        self.assertEqual(run.call_args.args[0][-1], "2048")


class TestGpuPlans(unittest.TestCase):
    def test_each_file_for_gpus_can_be_asked_before_it_runs(self):
        paths = sorted(ONE_GPU.parent.glob("*[1248]gpu*.py"))
        for path, contract in zip(paths, ask_each(installed(), paths), strict=True):
            with self.subTest(file=path.name):
                self.assertEqual(contract.errors, [])
                problems = [plan.problems() for plan in of_contract(contract)]
                self.assertEqual(problems, [[]] * len(contract.tests))

    def test_the_pool_of_the_one_gpu_test_holds_all_requests(self):
        contract = ask(installed(), ONE_GPU)
        self.assertEqual([plan.warnings() for plan in of_contract(contract)], [[]])
        for process in contract.tests[0].processes:
            if process.settings:
                given = dict(zip(process.argv, process.argv[1:]))
                needed = int(given["--max-running-requests"]) * int(given["--context-length"])
                self.assertGreaterEqual(int(given["--max-total-tokens"]), needed, process.name)


if __name__ == "__main__":
    unittest.main()
