"""SGLang's own clients and response models against the engine: its frontend language, and the shape of every answer."""

import json
import unittest

import requests
import sglang as sgl
from engine_servers import GREEDY, RANDOM, EngineHere, events
from pdkit.core.ci_register import register_cpu_ci
from sglang.api.v1 import api_types
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.srt.entrypoints.openai import protocol, sse_utils
from sglang.srt.entrypoints.openai.utils import to_openai_style_logprobs
from transformers import AutoTokenizer

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

msgspec = api_types.msgspec  # a requirement of SGLang's, not of this project
ASK = {"model": "random", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
CHAT = ASK | {"messages": [{"role": "user", "content": "12 plus 5"}]}
PROMPT = "Question: 12 plus 5 naïve 東京"
COMPLETION = ASK | {"prompt": PROMPT}


def setUpModule():
    global mono
    mono = EngineHere("null", "--enable-cache-report")


@sgl.function
def answer_and_choose(s, question):
    s += question
    s += sgl.gen("answer", max_tokens=8, temperature=0, ignore_eos=True)
    s += "\nSo " + sgl.select("choice", ["1", "22", "333"], temperature=0)


class TestFrontend(unittest.TestCase):
    """`sglang.lang` with RuntimeEndpoint."""

    @classmethod
    def setUpClass(cls):
        cls.endpoint = RuntimeEndpoint(mono.url)

    def greedy(self, text, count=8):
        params = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return mono.generate(text, sampling_params=params)["text"]

    def likeliest(self, text, choices):
        """SGLang's default choice: the highest mean logprob of the prompt's end."""

        def mean(choice):
            start = mono.generate(text)["meta_info"]["prompt_tokens"] - 2
            meta = mono.generate(text + choice, return_logprob=True, logprob_start_len=start)["meta_info"]
            scores = [logprob for logprob, *_ in meta["input_token_logprobs"] if logprob]
            return sum(scores) / len(scores)

        return max(choices, key=mean)

    def test_gen_and_select(self):
        state = answer_and_choose.run(question="12 plus 5", backend=self.endpoint)
        self.assertEqual(state["answer"], self.greedy("12 plus 5"))
        before = "12 plus 5" + state["answer"] + "\nSo "
        self.assertEqual(state["choice"], self.likeliest(before, ["1", "22", "333"]))

    def test_streamed_and_in_a_batch(self):
        state = answer_and_choose.run(question="12 plus 5", backend=self.endpoint, stream=True)
        self.assertEqual("".join(state.text_iter("answer")), self.greedy("12 plus 5"))
        state.sync()
        questions = ["1", "12 plus 5"]
        states = answer_and_choose.run_batch([{"question": each} for each in questions], backend=self.endpoint)
        self.assertEqual([each["answer"] for each in states], [self.greedy(each) for each in questions])

    def test_fork_and_logprobs(self):
        @sgl.function
        def forked(s):
            s += "12 plus"
            parts = s.fork(2)
            for number, part in enumerate(parts):
                part += f" {number}" + sgl.gen("part", max_tokens=4, temperature=0, ignore_eos=True)
            s += parts[0]["part"] + parts[1]["part"]
            s += sgl.gen("end", max_tokens=3, temperature=0, ignore_eos=True, return_logprob=True, top_logprobs_num=2,
                         return_text_in_logprobs=True)  # fmt: skip

        state = forked.run(backend=self.endpoint)
        parts = [self.greedy(f"12 plus {number}", 4) for number in (0, 1)]
        self.assertEqual(state.text(), "12 plus" + "".join(parts) + state["end"])
        meta = state.get_meta_info("end")
        spelled = "".join(text for _, _, text in meta["output_token_logprobs"])
        self.assertEqual(spelled, AutoTokenizer.from_pretrained(RANDOM).decode(
            [token for _, token, _ in meta["output_token_logprobs"]]))  # fmt: skip
        self.assertEqual([len(row) for row in meta["output_top_logprobs"]], [2] * 3)

    def test_what_the_frontend_can_ask_and_the_engine_cannot(self):
        @sgl.function
        def number(s):
            s += "12 plus 5" + sgl.gen("answer", max_tokens=4, regex="[0-9]+")

        self.assertRegex(str(number.run(backend=self.endpoint).error()), "regex=.*sglang-cpu")


class TestShapes(unittest.TestCase):
    """What is sent is to the key what SGLang's own response models write."""

    maxDiff = None

    def post(self, path, body):
        response = mono.post(path, body)
        self.assertEqual(response.status_code, 200, response.text)
        return response.json()

    def stream(self, path, body):
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = events(mono.post(path, body | usage, stream=True))
        return chunks, last

    def assertWritten(self, model, data, **options):
        self.assertEqual(json.loads(model.model_validate(data).model_dump_json(**options)), data)

    def test_completions(self):
        for more in ({}, {"logprobs": 2}, {"logprobs": 0}, {"n": 2}, {"echo": True, "logprobs": 1}, {"stop": "a"}):
            with self.subTest(more=more):
                whole = self.post("/v1/completions", COMPLETION | more)
                self.assertWritten(protocol.CompletionResponse, whole)
                self.assertEqual((whole["object"], whole["model"]), ("text_completion", "random"))
                chunks, last = self.stream("/v1/completions", COMPLETION | more)
                self.assertEqual(last["choices"], [])
                for chunk in chunks:
                    self.assertWritten(protocol.CompletionStreamResponse, chunk)
                self.assertWritten(protocol.CompletionStreamResponse, last, exclude_none=True)

    def test_chat(self):
        for more in ({}, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"n": 2}):
            with self.subTest(more=more):
                whole = self.post("/v1/chat/completions", CHAT | more)
                self.assertWritten(protocol.ChatCompletionResponse, whole)
                said = whole["object"], whole["choices"][0]["message"]["role"]
                self.assertEqual(said, ("chat.completion", "assistant"))
                chunks, last = self.stream("/v1/chat/completions", CHAT | more)
                self.assertEqual({chunk["object"] for chunk in chunks}, {"chat.completion.chunk"})
                for chunk in chunks:
                    written = msgspec.json.encode(msgspec.convert(chunk, sse_utils.StreamChunk))
                    self.assertEqual(json.loads(written), chunk)
                self.assertWritten(protocol.ChatCompletionStreamResponse, last)

    def test_chat_with_meta_info(self):
        """SGLang's run_eval asks for it, and takes a refusal for an empty answer."""
        answer = self.post("/v1/chat/completions", CHAT | {"return_meta_info": True})
        self.assertWritten(protocol.ChatCompletionResponse, answer)
        self.assertEqual(answer["choices"][0]["meta_info"]["completion_tokens"], 6)
        refused = mono.post("/v1/chat/completions", CHAT | {"return_meta_info": True, "stream": True})
        self.assertEqual((refused.status_code, refused.json()["param"]), (400, "return_meta_info"))

    def test_errors_and_models(self):
        for path, body in (
            ("/v1/completions", COMPLETION | {"max_tokens": -1}),
            ("/v1/completions", COMPLETION | {"suffix": 5}),
            ("/v1/completions", COMPLETION | {"min_p": 0.5}),
            ("/v1/chat/completions", CHAT | {"tools": [{"function": {"name": "f"}}]}),
        ):
            response = mono.post(path, body)
            self.assertEqual(response.status_code, 400)
            self.assertWritten(protocol.ErrorResponse, response.json())
        self.assertWritten(protocol.ModelList, requests.get(mono.url + "/v1/models", timeout=30).json())

    def test_generate(self):
        """SGLang's contract of the answer names every key of it; where it has no value, SGLang leaves out the key."""
        body = {"text": PROMPT, "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 0}
        known = {field.name for field in msgspec.structs.fields(api_types.GenerateMetaInfo)}
        meta = self.post("/generate", body | {"top_logprobs_num": 2})["meta_info"]
        self.assertEqual(set(meta) - known, {"num_retractions"} - known)
        chunks = events(mono.post("/generate", body | {"stream": True}, stream=True))
        *first, last = ("e2e_latency" in chunk["meta_info"] for chunk in chunks)
        self.assertEqual((any(first), last), (False, True))

    def test_server_info(self):
        info = mono.info()
        self.assertEqual((info["page_size"], info["max_total_num_tokens"]), (128, 128 * 512))
        self.assertNotIn("avg_spec_accept_length", info["internal_states"][0])
        cached = "Question: " * 300
        for expected in (False, True):
            tokens = self.post("/generate", {"text": cached, "sampling_params": GREEDY})["meta_info"]["cached_tokens"]
            self.assertEqual((tokens > 0, tokens % info["page_size"]), (expected, 0))


class TestEcho(unittest.TestCase):
    """A completion with echo and logprobs scores its prompt: what log-likelihood evaluations are made of."""

    def test_the_prompts_logprobs_are_those_of_generate_as_sglang_spells_them(self):
        tokenizer = AutoTokenizer.from_pretrained(RANDOM)
        body = {
            "text": PROMPT, "sampling_params": GREEDY | {"max_new_tokens": 6}, "return_logprob": True,
            "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True,
        }  # fmt: skip
        meta = mono.generate(PROMPT, **body)["meta_info"]
        lists = {name: meta[name] for name in (
            "input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs")}  # fmt: skip
        expected = to_openai_style_logprobs(**lists, tokenizer=tokenizer).model_dump()
        self.assertEqual(len(expected["tokens"]), meta["prompt_tokens"] + 6)
        ask = COMPLETION | {"echo": True, "logprobs": 2}
        (choice,) = mono.post("/v1/completions", ask).json()["choices"]
        self.assertEqual(choice["logprobs"], expected)
        self.assertTrue(choice["text"].startswith(PROMPT))
        streamed = [chunk["choices"][0]["logprobs"] for chunk in events(mono.post(
            "/v1/completions", ask | {"stream": True}, stream=True))]  # fmt: skip
        whole = {name: sum((each[name] for each in streamed if each), []) for name in expected}
        self.assertEqual(whole, expected)

    def test_only_with_echo_and_with_logprobs(self):
        for more in ({"echo": True, "logprobs": 0}, {"logprobs": 2}):
            (choice,) = mono.post("/v1/completions", COMPLETION | more).json()["choices"]
            self.assertEqual(len(choice["logprobs"]["tokens"]), 6)


if __name__ == "__main__":
    unittest.main()
