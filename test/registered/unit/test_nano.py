"""The nano DeepSeek-V4: experts, model loading, tokenizer, data set and checkpoint."""

import hashlib
import json
import operator
import random
import re
import shutil
import sys
import unittest
from itertools import islice
from pathlib import Path

import pdkit
import torch
from cases import FolderCase
from pdkit.core import forked
from pdkit.core.errors import ExitCode
from pdkit.engine.forward import Forward
from pdkit.engine.state import new_cache
from pdkit.models.cpu.evaluation import Score, prompt, rows_of, score, validation
from pdkit.models.cpu.experts import NAME, dense_experts_forward
from pdkit.models.cpu.fit import solved
from pdkit.models.cpu.model import ModelError, load_config, load_model, save_model
from pdkit.models.cpu.training import (
    ALL_ENTRIES,
    Batches,
    IndexerRecords,
    Stage,
    alignment,
    losses,
    new_model,
    recipe,
    set_index_topk,
    train,
)
from pdkit.models.problems import EVALUATION_ROWS, draw, evaluation_set, few_shot, is_held_out, stream, write_jsonl
from pdkit.models.tokenizer import nano_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sglang.test.ci.ci_register import register_cpu_ci
from transformers import AutoTokenizer
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

ASSETS = Path(pdkit.__path__[0]) / "assets"
RANDOM = ASSETS / "random-dsv4"
TRAINED = ASSETS / "nano-dsv4"

torch.set_num_threads(1)


def _experts(num_experts=4, hidden=32, inner=24, seed=0):
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner, "n_routed_experts": num_experts}
    config = DeepseekV4Config(**sizes, num_experts_per_tok=2, num_hidden_layers=1)
    config._experts_implementation = "eager"
    module = DeepseekV4Experts(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=3.0, generator=generator)
    return module.requires_grad_(False)


class TestDenseExperts(unittest.TestCase):
    def _check(self, rows, index):
        module = _experts()
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, 32, generator=generator)
        weights = torch.rand(rows, 2, generator=generator)
        expected = module(hidden, index, weights)
        found, largest = dense_experts_forward(module, hidden, index, weights), expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)
        self.assertGreater(largest, 0)

    def test_equals_eager(self):
        generator = torch.Generator().manual_seed(7)
        for rows in (1, 2, 3, 7, 128):
            index = torch.rand(rows, 4, generator=generator).topk(2).indices
            with self.subTest(rows=rows):
                self._check(rows, index)

    def test_expert_named_twice_counts_twice(self):
        self._check(5, torch.zeros(5, 2, dtype=torch.long))

    def test_activations_are_clamped(self):
        module = _experts()
        hidden = 100 * torch.ones(1, 32)
        module.limit = 1e-3
        out = dense_experts_forward(module, hidden, torch.tensor([[0, 1]]), torch.ones(1, 2))
        bound = 2 * 24 * 1e-6 * module.down_proj.abs().max().item()
        self.assertLess(out.abs().max().item(), bound)

    def test_selected_by_name(self):
        module = _experts()
        module.config._experts_implementation = NAME
        hidden, index, weights = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
        found = module(hidden, index, weights)
        self.assertTrue(torch.equal(found, dense_experts_forward(module, hidden, index, weights)))


def _digest(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.double().numpy().tobytes())
    return digest.hexdigest()


def _logits(model, length=140):
    ids = torch.arange(length).mul(7).remainder(500).add(3).unsqueeze(0)
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


class TestRandomModel(FolderCase):
    def test_is_ready_to_serve(self):
        model = load_model(RANDOM, load_format="dummy")
        self.assertFalse(model.training)
        self.assertEqual(model.config._attn_implementation, "eager")
        self.assertEqual(model.config._experts_implementation, NAME)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.assertEqual(tensor.dtype, torch.float32, name)
                self.assertTrue(torch.equal(tensor, tensor.bfloat16().float()), name)
                self.assertGreater(len(tensor.unique()), 0.3 * min(len(tensor.reshape(-1)), 1000), name)

    def test_weights_are_a_function_of_the_seed(self):
        zero, one, two = (_digest(load_model(RANDOM, load_format="dummy", seed=seed)) for seed in range(3))
        self.assertEqual(zero, "6e9a5876281d976f740d5db43d2a5c4bc4028d07cb10c853757bd460511f21a2")
        self.assertNotEqual(one, two)

    def test_hash_layer_routes_to_distinct_experts(self):
        routes = load_model(RANDOM, load_format="dummy").state_dict()["model.layers.0.mlp.gate.tid2eid"]
        self.assertTrue((routes[:, 0] != routes[:, 1]).all())
        self.assertEqual(sorted(routes.unique().tolist()), [0, 1, 2, 3])

    def test_every_weight_matters(self):
        model = load_model(RANDOM, load_format="dummy")
        before = _logits(model)
        generator = torch.Generator().manual_seed(0)
        for name, tensor in model.state_dict().items():
            saved = tensor.clone()
            if tensor.is_floating_point():
                tensor.add_(0.5 * saved.abs().mean() * torch.randn(saved.shape, generator=generator))
            else:
                tensor.copy_((saved + 1) % 4)
            with self.subTest(name):
                self.assertGreater((_logits(model) - before).abs().max().item(), 1e-3)
            tensor.copy_(saved)
        self.assertTrue(torch.equal(_logits(model), before))

    def test_survives_a_checkpoint(self):
        model = load_model(RANDOM, load_format="dummy", seed=3)
        before = _logits(model)
        save_model(model, self.root)
        self.assertTrue(torch.equal(_logits(load_model(self.root)), before))
        self.assertTrue(torch.equal(_logits(model), before))


class TestModelErrors(FolderCase):
    def setUp(self):
        super().setUp()
        shutil.copy(RANDOM / "config.json", self.root)

    def _refused(self, *words, path=None):
        with self.assertRaises(ModelError) as caught:
            load_model(path or self.root)
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        for word in words:
            self.assertIn(word, message)

    def _edit_config(self, **fields):
        file = self.root / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def _write_weights(self):
        save_model(load_model(self.root, load_format="dummy"), self.root)

    def test_what_is_wrong_is_named(self):
        config, weights = self.root / "config.json", self.root / "model.safetensors"
        sink = "model.layers.2.attn.attn_sink"

        def edit_weights(edit):
            tensors = load_file(weights)
            edit(tensors)
            save_file(tensors, weights, metadata={"format": "pt"})

        self._refused("config.json", path=self.root / "nowhere")
        self._refused("model.safetensors", "--load-format dummy")
        self._write_weights()
        for spoil, *words in (
            (lambda: config.write_text("{"), "not valid JSON"),
            (lambda: self._edit_config(model_type="llama"), "llama", "deepseek_v4"),
            (lambda: self._edit_config(num_hidden_layers="many"), "not a valid DeepSeek-V4 configuration"),
            (lambda: weights.write_bytes(weights.read_bytes()[:100_000]), "damaged"),
            (lambda: self._edit_config(vocab_size=300), "does not fit"),
            (lambda: self._edit_config(n_routed_experts=5), "does not fit"),
            (lambda: edit_weights(lambda tensors: tensors.pop(sink)), "does not fit", "layers.2.self_attn.sinks"),
            (lambda: edit_weights(lambda tensors: tensors.update(surprise=torch.zeros(1))), "does not fit", "surprise"),
        ):
            with self.subTest(words):
                whole = config.read_bytes(), weights.read_bytes()
                spoil()
                self._refused(*words)
                config.write_bytes(whole[0])
                weights.write_bytes(whole[1])


class TestProblems(FolderCase):
    def test_answers_are_worked_correctly(self):
        operators = {"+": operator.add, "-": operator.sub, "*": operator.mul}
        for problem in islice(stream(1), 2000):
            steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", problem.answer)
            self.assertGreaterEqual(len(steps), 2, problem)
            known = set(re.findall(r"\d+", problem.question))
            for left, sign, right, result in steps:
                self.assertLessEqual({left, right}, known, problem)
                self.assertEqual(operators[sign](int(left), int(right)), int(result), problem)
                known.add(result)
            self.assertTrue(problem.answer.endswith(f"\n#### {steps[-1][3]}"), problem)

    def test_splits_never_share_a_problem(self):
        rng = random.Random(0)
        for _ in range(500):
            self.assertFalse(is_held_out(draw(rng, held_out=False).key))
            self.assertTrue(is_held_out(draw(rng, held_out=True).key))
        training = {problem.question for problem in islice(stream(0), 20_000)}
        rows = evaluation_set(EVALUATION_ROWS)
        self.assertEqual(len({problem.key for problem in rows}), EVALUATION_ROWS)
        self.assertFalse(training & {problem.question for problem in rows})

    def test_training_stream_depends_on_the_seed_alone(self):
        self.assertEqual(list(islice(stream(1), 50)), list(islice(stream(1), 50)))
        self.assertNotEqual(list(islice(stream(1), 50)), list(islice(stream(2), 50)))

    def test_committed_data_set_is_what_the_generator_writes(self):
        file = self.root / "data.jsonl"
        write_jsonl(evaluation_set(EVALUATION_ROWS), file)
        self.assertEqual(file.read_bytes(), (ASSETS / "gsm8k_nano.jsonl").read_bytes())


class TestTokenizer(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tokenizer = AutoTokenizer.from_pretrained(RANDOM, local_files_only=True)

    def _ids(self, text):
        return self.tokenizer(text).input_ids

    def test_fits_the_model_config(self):
        config = json.loads((RANDOM / "config.json").read_text())
        tokenizer = self.tokenizer
        self.assertEqual(len(tokenizer), config["vocab_size"])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self.assertEqual(getattr(tokenizer, name), config[name])

    def test_adds_nothing_and_loses_nothing(self):
        text = few_shot(evaluation_set(3))
        for each in (text, text[:-2], "é漢  x ,\n\t.", " 007-8", ""):
            self.assertEqual(self.tokenizer.decode(self._ids(each)), each)

    def test_one_token_per_digit(self):
        tokens = self.tokenizer.convert_ids_to_tokens(self._ids("abc 1234*56=7 890"))
        digits = [token for token in tokens if re.search(r"\d", token)]
        self.assertEqual(digits, list("1234567890"))

    def test_pieces_of_a_prompt_encode_as_the_whole(self):
        problem = evaluation_set(1)[0]
        pieces = (f"Question: {problem.question}\nAnswer:", f" {problem.answer}\n\n", "Question: 5")
        self.assertEqual(self._ids("".join(pieces)), [token for piece in pieces for token in self._ids(piece)])

    def test_chat_template_ends_a_turn_with_eos(self):
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        ids = self.tokenizer.apply_chat_template(turns, tokenize=False)
        self.assertEqual(ids, "<|user|>1<|assistant|> 2</s>")
        prompt = self.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        self.assertEqual(prompt, "<|user|>1<|assistant|>")
        self.assertEqual(len(self._ids(prompt)), 3)

    def test_committed_tokenizers_are_what_the_generator_writes(self):
        expected = json.loads(nano_tokenizer().backend_tokenizer.to_str())
        for model in ("random-dsv4", "nano-dsv4"):
            self.assertEqual(json.loads((ASSETS / model / "tokenizer.json").read_text()), expected)


class TestEvaluation(unittest.TestCase):
    def test_one_wrong_token_of_an_answer_or_of_a_draft_counts(self):
        rows = rows_of(*validation(3, seed=0))
        tokenizer = AutoTokenizer.from_pretrained(TRAINED, local_files_only=True)
        (question, answer), length = (tokenizer(text).input_ids for text in rows[1]), len(tokenizer)

        def right(ids, wrong=0, of_draft=0):
            logits, drafts = (torch.nn.functional.one_hot(ids.roll(-ahead, 1), length) for ahead in (1, 2))
            last = len(question) + len(answer) - 1
            logits[1, last - 1] = logits[1, last - 1].roll(wrong)
            drafts[1, last - 2] = drafts[1, last - 2].roll(of_draft)
            return logits, drafts

        self.assertEqual(score(right, tokenizer, rows), Score(3, 1.0, 1.0))
        self.assertEqual(score(lambda ids: right(ids)[:1], tokenizer, rows), Score(3, 1.0, None))
        self.assertEqual(score(lambda ids: right(ids, wrong=1), tokenizer, rows), Score(3, 2 / 3, 1.0))
        drafted = score(lambda ids: right(ids, of_draft=1), tokenizer, rows)
        self.assertTrue(drafted.solved == 1 and 0.9 < drafted.drafted < 1, drafted)


class TestTraining(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tokenizer = AutoTokenizer.from_pretrained(RANDOM, local_files_only=True)

    def _model(self):
        return new_model(load_config(TRAINED), seed=0)

    def _random_model(self, index_topk):
        model = load_model(RANDOM, load_format="dummy").requires_grad_(True)
        set_index_topk(model, index_topk)
        return model

    def test_forward_equals_the_served_model(self):
        for length, index_topk in ((32, 8), (256, 8), (256, ALL_ENTRIES)):
            ids, weights = Batches(self.tokenizer, 0).draw(2, length)
            model = self._random_model(index_topk)
            loss, _ = losses(model, IndexerRecords(model), ids, weights)
            log_probabilities = model(ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
            each = -log_probabilities.gather(2, ids[:, 1:, None])[..., 0]
            expected = (each * weights[:, 1:]).sum() / weights[:, 1:].sum()
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            self.assertEqual(model.config._attn_implementation, "eager")

    def test_each_loss_trains_its_own_weights(self):
        model = self._random_model(8)
        ids, weights = Batches(self.tokenizer, 0).draw(1, 160)
        loss, index_loss = losses(model, IndexerRecords(model), ids, weights)
        for which, (objective, of_indexer) in {"language": (loss, False), "indexer": (index_loss, True)}.items():
            model.zero_grad()
            objective.backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                trained = parameter.grad is not None and parameter.grad.abs().max().item() > 0
                with self.subTest(loss=which, parameter=name):
                    self.assertEqual(trained, (".indexer." in name) == of_indexer)

    def test_alignment_is_least_at_the_mass(self):
        mass = torch.tensor([[[0.2, 0.6, 0.0], [0.0, 0.0, 0.0], [0.3, 0.1, 0.1]]])
        scores = torch.where(mass > 0, mass.log(), 5.0)
        best = alignment(scores, mass).item()
        entropy = -(mass * (mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)).clamp_min(1e-9).log()).sum() / mass.sum()
        self.assertAlmostEqual(best, entropy.item(), places=5)
        for seed in range(5):
            noise = torch.randn(mass.shape, generator=torch.Generator().manual_seed(seed))
            self.assertGreater(alignment(scores + noise, mass).item(), best)

    def test_batches(self):
        ids, weights = Batches(self.tokenizer, 5).draw(64, 256)
        self.assertEqual((ids.shape, weights.shape), ((64, 256), (64, 256)))
        again = Batches(self.tokenizer, 5).draw(64, 256)
        self.assertTrue(torch.equal(ids, again[0]) and torch.equal(weights, again[1]))
        texts = [self.tokenizer.decode(row) for row in ids]
        chats = [text for text in texts if text.startswith("<|user|>")]
        self.assertTrue(0 < len(chats) < 32)
        self.assertTrue(all(text.startswith(("Question: ", "<|user|>")) for text in texts))
        answer = self.tokenizer.decode(ids[0][weights[0] == 1])
        self.assertNotIn("Question", answer)
        self.assertIn("####", answer)

    def test_learns_and_follows_the_stages(self):
        model = self._model()
        stages = (Stage("a", 64, 8, 12, ALL_ENTRIES), Stage("b", 128, 4, 12, 4))
        topk, steps = [], []
        for at in train(model, Batches(self.tokenizer, 0), stages):
            topk.append(model.model.layers[1].self_attn.compressor.indexer.index_topk)
            steps.append(at)
        self.assertEqual(topk, [ALL_ENTRIES] * 12 + [4] * 12)
        self.assertLess(steps[-1].loss, steps[0].loss - 2)
        self.assertEqual((steps[-1].step, steps[-1].tokens), (24, 24 * 512))
        self.assertLess(steps[-1].lr, 0.05 * max(at.lr for at in steps))

    def test_recipe_scales(self):
        full, short = recipe(8), recipe(8, 0.001)
        self.assertEqual([stage.steps for stage in short], [1, 1, 1])
        self.assertEqual([stage.index_topk for stage in full], [ALL_ENTRIES, ALL_ENTRIES, 8])
        self.assertEqual(max(stage.length for stage in full), 1024)


class TestTrainingScript(unittest.TestCase):
    @unittest.skipIf(torch.cuda.is_available(), "this machine has a GPU")
    def test_says_that_there_is_no_gpu(self):
        run = forked.run([sys.executable, "-m", "pdkit", "model", "train", "--device", "cuda"])
        self.assertEqual(run.returncode, ExitCode.NOT_READY)
        self.assertEqual(run.stderr.strip().count("\n"), 0, run.stderr)
        self.assertIn("--device cpu", run.stderr)


class TestTrainedModel(unittest.TestCase):
    def test_scores_on_the_committed_rows(self):
        """By the forward pass that the engine serves it with, row by row: a batch is read from memory, and slower."""
        tokenizer = AutoTokenizer.from_pretrained(TRAINED, local_files_only=True)
        rows, model = evaluation_set(EVALUATION_ROWS), load_model(TRAINED)
        forward = Forward(model)

        @torch.inference_mode()
        def logits_of(ids):
            return (model.lm_head(forward(ids, new_cache(model.config))),)

        asked = rows_of(rows[5:45], rows[:5])
        self.assertGreaterEqual(score(logits_of, tokenizer, asked, batch=1).solved, 0.95)
        self.assertEqual(solved(model, tokenizer, asked[:4]), score(logits_of, tokenizer, asked[:4]).solved)

    def test_record_belongs_to_the_checkpoint(self):
        record = json.loads((TRAINED / "training.json").read_text())
        config = json.loads((TRAINED / "config.json").read_text())
        self.assertEqual(record["index_topk"], config["index_topk"])
        self.assertEqual(record["parameters"], sum(each.numel() for each in load_model(TRAINED).parameters()))
        self.assertGreaterEqual(record["scores"]["5 shots"]["score"], 0.97)
        self.assertGreaterEqual(record["scores"]["5 shots"]["examples"], 200)

    def test_checkpoint_is_small_and_bfloat16(self):
        file = TRAINED / "model.safetensors"
        self.assertLess(file.stat().st_size, 4e6)
        with safe_open(file, "pt") as tensors:
            types = {tensors.get_tensor(name).dtype for name in tensors.keys()}
        self.assertEqual(types, {torch.bfloat16, torch.int64})

    def test_selects_fewer_entries_than_an_eval_prompt_has(self):
        config = json.loads((TRAINED / "config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(TRAINED, local_files_only=True)
        rows = evaluation_set(6)
        entries = len(tokenizer(prompt(rows[:5], rows[5])).input_ids) // 4
        self.assertLess(config["index_topk"], entries / 2)

    def test_configs_are_what_the_generators_write(self):
        """`pdkit model train` starts from the one and changes index_topk."""
        trained, random = (json.loads((path / "config.json").read_text()) for path in (TRAINED, RANDOM))
        differing = {name for name in trained | random if trained.get(name) != random.get(name)}
        self.assertLessEqual(differing, {"index_topk", "initializer_range", "transformers_version"})


if __name__ == "__main__":
    unittest.main()
