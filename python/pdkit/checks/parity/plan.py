"""What parity checks send: prompts at the lengths where a state changes its shape, and how they are sent.

Pure: a model's geometry and a few random numbers in, requests out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pdkit.checks.parity.answers import Answer

TOP_LOGPROBS = 8
PARAMETER_TOKENS, PARAMETER_PROMPT, PARAMETER_TEXT = 24, 64, 200  # new tokens; tokens of a prompt, characters of one
SHARED_TOKENS = 32  # where a page of the prefix cache is smaller, down to one token, prefixes are as if it were this


@dataclass(frozen=True)
class Geometry:
    """Where the state of a prompt changes its shape; all in tokens.

    window   sliding window, None without one
    ratios   tokens a compressed entry stands for, one for each kind of compression
    chunk    what chunked prefill computes at a time, None if unknown
    page     what the prefix cache keeps or forgets as one, None if unknown
    context  the longest prompt and output together
    chosen   above it the indexer has to choose among compressed entries, None without one
    """

    vocab_size: int
    window: int | None = None
    ratios: tuple[int, ...] = ()
    chunk: int | None = None
    page: int | None = None
    context: int = 4096
    chosen: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], info: Mapping[str, Any]) -> "Geometry":
        """From a model's config.json, in transformers' names or DeepSeek's own, and a server's `/server_info`."""
        rates = config.get("compress_rates")
        if rates:
            used = {rates[kind] for kind in config.get("layer_types") or rates if kind in rates}
        else:
            used = {ratio for ratio in config.get("compress_ratios") or () if ratio > 1}
        return cls(
            vocab_size=config["vocab_size"],
            window=config.get("sliding_window"),
            ratios=tuple(sorted(used)),
            chunk=info.get("chunked_prefill_size"),
            page=info.get("page_size") or info.get("chunked_prefill_size"),
            context=min(
                filter(None, (info.get("context_length"), config.get("max_position_embeddings"))), default=4096
            ),
            chosen=config["index_topk"] * min(used) if used and config.get("index_topk") else None,
        )

    @property
    def edges(self) -> dict[str, int]:
        """What begins at how many tokens, in words."""
        named: dict[str, int | None] = {f"{ratio}x compressor": ratio for ratio in self.ratios}
        named |= {"sliding window": self.window, "prefill chunk": self.chunk, "page of the prefix cache": self.page}
        named |= {"indexer": self.chosen}
        return {what: tokens for what, tokens in named.items() if tokens}

    def boundaries(self, longest: int) -> tuple[int, ...]:
        """Lengths up to `longest`: 1, and one less to one more than each ratio, the window, 1, 2, 4 chunks or pages."""
        blocks = {factor * size for factor in (1, 2, 4) for size in (self.chunk, self.page) if size}
        edges = {*self.ratios, *blocks, self.window or 1}
        lengths = {1} | {edge + offset for edge in edges for offset in (-1, 0, 1)}
        return tuple(sorted(length for length in lengths if 1 <= length <= longest))


@dataclass(frozen=True)
class Probe:
    """One request. `body` is its JSON; probes with the same body and path ask for the same thing."""

    name: str
    body: str
    path: str = "/generate"

    @cached_property
    def request(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def key(self) -> tuple[str, str]:
        return self.path, self.body

    @property
    def prompt_length(self) -> int | None:
        ids = self.request.get("input_ids")
        return None if ids is None else len(ids)

    @property
    def asks_logprobs(self) -> bool:
        return bool(self.request.get("return_logprob"))

    @property
    def streams(self) -> bool:
        return bool(self.request.get("stream"))


def generate_probe(
    name: str, ids: Sequence[int], new_tokens: int, options: Mapping[str, Any] | None = None, **sampling: Any
) -> Probe:
    """A greedy request of exactly `new_tokens` tokens with logprobs, unless `sampling` or `options` say otherwise."""
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **sampling}
    body = {"input_ids": list(ids), "sampling_params": params, "return_logprob": True, "top_logprobs_num": TOP_LOGPROBS}
    return Probe(name, json.dumps({**body, **(options or {})}))


def completion_probe(name: str, prompt: str, new_tokens: int, **params: Any) -> Probe:
    """The same through OpenAI's API, as evals use it; a text in, a text out."""
    body = {"model": "default", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, **params}
    return Probe(name, json.dumps(body), "/v1/completions")


@dataclass(frozen=True)
class Round:
    """Probes that are sent together.

    in_flight  how many at a time; 1 sends them alone, in order
    flush      empty the prefix caches first
    cached     names of probes of which a part comes from prefill's cache, if it has one
    cold       no part of any probe does
    batch      all in one HTTP request
    """

    condition: str
    probes: tuple[Probe, ...]
    in_flight: int = 1
    flush: bool = False
    cached: frozenset[str] = frozenset()
    cold: bool = False
    batch: bool = False


@dataclass
class Prompts:
    """Token ids that no two prompts share the beginning of: random ones, and running pieces of a text.

    vocabulary  ids to draw from. natural: the text's ids, as long as needed.
    """

    vocabulary: Sequence[int]
    natural: Sequence[int]
    seed: int = 0
    _rng: np.random.Generator = field(init=False, repr=False)
    _next: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def random_ids(self, length: int) -> tuple[int, ...]:
        return tuple(self._rng.choice(self.vocabulary, length).tolist())

    def natural_ids(self, length: int) -> tuple[int, ...]:
        """The next `length` ids of the text; a short text begins anew, one token on."""
        if self._next + length > len(self.natural):
            self._next = self._next % 7 + 1
        ids = tuple(self.natural[self._next : self._next + length])
        if len(ids) < length:
            raise ValueError(f"the natural text has {len(self.natural)} tokens, a prompt of {length} is wanted")
        self._next += length
        return ids


@dataclass(frozen=True)
class PlanOptions:
    """Sizes of the rounds. Lengths and tokens; `rooms`, `in_flight` and `indexed` count requests."""

    longest: int = 1000
    alone_tokens: int = 4
    tokens: int = 24
    room_tokens: int = 6
    room_length: int = 48
    rooms: int = 64
    in_flight: int = 32
    extra_lengths: tuple[int, ...] = (700, 1000)
    indexed: int = 24
    indexed_tokens: int = 12


@dataclass(frozen=True)
class ParityPlan:
    """The rounds of one parity run, by what they check."""

    alone: tuple[Round, ...]
    cached: tuple[Round, ...]
    concurrent: tuple[Round, ...]
    shared_prefix: tuple[Round, ...]
    rooms: tuple[Round, ...]
    indexed: tuple[Round, ...]

    @property
    def rounds(self) -> tuple[Round, ...]:
        return (*self.alone, *self.cached, *self.concurrent, *self.shared_prefix, *self.rooms, *self.indexed)


def lengths_of(geometry: Geometry, options: PlanOptions) -> tuple[int, ...]:
    """The boundary lengths and the long ones, as far as context and `options.longest` go."""
    longest = min(options.longest, geometry.context - 8 * options.tokens)
    extra = {length for length in options.extra_lengths if length <= longest}
    return tuple(sorted({*geometry.boundaries(longest), *extra}))


def make_plan(geometry: Geometry, prompts: Prompts, options: PlanOptions = PlanOptions()) -> ParityPlan:
    """All rounds but those of sampling parameters, which follow from reference answers."""
    lengths = lengths_of(geometry, options)
    random = [(f"random-{length}", prompts.random_ids(length)) for length in lengths]
    natural = [(f"natural-{length}", prompts.natural_ids(length)) for length in lengths[2::3]]
    alone = Round(
        "alone, cold cache",
        tuple(generate_probe(name, ids, options.alone_tokens) for name, ids in random + natural),
        flush=True,
        cold=True,
    )
    return ParityPlan(
        alone=(alone,),
        cached=_cached(geometry, alone, options),
        concurrent=_concurrent(geometry, prompts, lengths, options),
        shared_prefix=_shared_prefix(geometry, prompts, options),
        rooms=_rooms(prompts, options),
        indexed=_indexed(geometry, prompts, options),
    )


def _cached(geometry: Geometry, alone: Round, options: PlanOptions) -> tuple[Round, ...]:
    long = tuple(probe for probe in alone.probes if geometry.page and (probe.prompt_length or 0) > geometry.page)
    if not long:
        return ()
    names = frozenset(probe.name for probe in long)
    return (
        Round("before the prefix is cached", long, options.in_flight, flush=True, cold=True),
        Round("prefix from prefill's cache", long, options.in_flight, cached=names),
        Round("after flush_cache", long, options.in_flight, flush=True, cold=True),
    )


def _concurrent(
    geometry: Geometry, prompts: Prompts, lengths: Sequence[int], options: PlanOptions
) -> tuple[Round, ...]:
    """Both kinds of prompts at each length; some decode until a longest compressed entry was filled by decode alone.

    These are sent first, so that the others are decoded beside them.
    """
    both = (("random", prompts.random_ids), ("natural", prompts.natural_ids))
    largest = max((*geometry.ratios, geometry.window or 1))
    start = max(1, largest - 8)
    long = largest + 16
    probes = []
    if start + long < geometry.context and start <= options.longest:
        probes += [
            generate_probe(f"{kind}-{start}-long-output-{turn}", ids(start), long)
            for kind, ids in both
            for turn in (1, 2)
        ]
    probes += [
        generate_probe(f"{kind}-{length}", ids(length), options.tokens) for length in lengths for kind, ids in both
    ]
    return (Round(f"{options.in_flight} in flight", tuple(probes), options.in_flight, flush=True),)


def _shared_prefix(geometry: Geometry, prompts: Prompts, options: PlanOptions) -> tuple[Round, ...]:
    """Requests that share a prefix and part: one after the other, in both orders, from the cache, and together.

    The prefixes: less than a page of the prefix cache, whole pages, pages and a half, and half a page with tails that fill
    it in different ways. Of the three tails of a prefix two have the same length, so that the state of the one fits where
    that of the other belongs.
    """
    page = max(geometry.page or max((*geometry.ratios, geometry.window or 1)), SHARED_TOKENS)
    short = max(4, page // 3)
    families, shared = [], {}
    for length, tail in ((page // 4, short), (2 * page, short), (2 * page + page // 2, short), (page // 2, page)):
        if length + tail + 5 + options.tokens > geometry.context:
            continue
        prefix = prompts.random_ids(max(1, length))
        tails = [prompts.random_ids(size) for size in (tail, tail, tail + 5)]
        names = [f"prefix-{len(prefix)}-{name}" for name in "abc"]
        shared.update(dict.fromkeys(names, length))
        families.append([generate_probe(name, prefix + ids, options.tokens // 3) for name, ids in zip(names, tails)])
    a, b, c = zip(*families)

    def wave(condition: str, probes: tuple[Probe, ...], cold: bool = False) -> Round:
        cached = frozenset(probe.name for probe in probes if geometry.page and not cold and shared[probe.name] >= page)
        return Round(f"shared prefix, {condition}", probes, len(probes), flush=cold, cold=cold, cached=cached)

    return (
        wave("a first", a, cold=True),
        wave("b after a", b),
        wave("a after b", a),
        wave("c after both", c),
        wave("b first", b, cold=True),
        wave("a, after b was first", a),
        Round("shared prefix, all together", (*a, *b, *c), options.in_flight, flush=True),
        Round("shared prefix, in one batch", a + b, batch=True),
    )


def _rooms(prompts: Prompts, options: PlanOptions) -> tuple[Round, ...]:
    """Many requests of one length and different content: a swapped room fits, and shows in the tokens only."""
    probes = tuple(
        generate_probe(f"room-{index}", prompts.random_ids(options.room_length), options.room_tokens)
        for index in range(options.rooms)
    )
    return (Round(f"{options.rooms} different prompts of one length", probes, options.in_flight, flush=True),)


def _indexed(geometry: Geometry, prompts: Prompts, options: PlanOptions) -> tuple[Round, ...]:
    """Long prompts alone, of which a third to two thirds of the compressed entries are not chosen.

    Enough of them that a test of signs sees what only long prompts show.
    """
    first = (geometry.chosen or 0) * 3 // 2
    last = min(2 * first, geometry.context - 8 * options.tokens)
    if not first or last < first or not options.indexed:
        return ()
    lengths = np.linspace(first, last, options.indexed).astype(int).tolist()
    probes = [generate_probe(f"indexed-{n}", prompts.random_ids(n), options.indexed_tokens) for n in lengths]
    return (Round("the indexer chooses", tuple(probes), flush=True, cold=True),)


@dataclass(frozen=True)
class Variation:
    """A probe with one request parameter set, and the one without it; the parameter shows if their answers differ."""

    probe: Probe
    without: Probe


def a_stop(text: str) -> str | None:
    """Three printable characters of `text` whose first occurrence is past its first third; None if there are none."""
    for start in range(len(text) // 3, len(text) - 3):
        piece = text[start : start + 3]
        if piece.isascii() and piece.isprintable() and text.find(piece) == start:
            return piece
    return None


def generate_variations(
    ids: Sequence[int], tokens: int, greedy: Answer, seeded: bool, prompt_logprobs: bool = True
) -> tuple[Variation, ...]:
    """One for each parameter of `/generate` that a balancer or a KV transfer could lose.

    greedy  the reference Answer to `generate_probe("greedy", ids, tokens)`, from which stops are chosen
    seeded  the engine gives the same tokens for the same sampling_seed, however it is loaded
    prompt_logprobs  they may be asked for
    """

    def with_(name: str, options: Mapping[str, Any] | None = None, **sampling: Any) -> Probe:
        return generate_probe(name, ids, tokens, options, **sampling)

    middle = [greedy.tokens[len(greedy.tokens) // 2]]
    base = with_("greedy")
    stopping = with_("stop_token_ids", ignore_eos=False, stop_token_ids=middle)
    hot = with_("temperature", temperature=1.0, sampling_seed=1)
    found = [
        Variation(with_("max_new_tokens", max_new_tokens=tokens // 3), base),
        Variation(with_("max_new_tokens 1", max_new_tokens=1), base),
        Variation(stopping, base),
        Variation(with_("ignore_eos", stop_token_ids=middle), stopping),
        *([Variation(with_("logprob_start_len", {"logprob_start_len": 0}), base)] if prompt_logprobs else []),
        Variation(with_("return_logprob", {"return_logprob": False, "top_logprobs_num": 0}), base),
        Variation(with_("stream", {"return_logprob": False, "top_logprobs_num": 0, "stream": True}), base),
        Variation(with_("top_k 1", temperature=1.0, top_k=1), hot),
    ]
    if stop := a_stop(greedy.text or ""):
        trimmed = with_("stop", stop=stop)
        found += [Variation(trimmed, base), Variation(with_("no_stop_trim", stop=stop, no_stop_trim=True), trimmed)]
    if seeded:
        found += [
            Variation(hot, base),
            Variation(with_("sampling_seed", temperature=1.0, sampling_seed=2), hot),
            Variation(with_("top_p", temperature=1.0, sampling_seed=1, top_p=0.5), hot),
            Variation(with_("top_k", temperature=1.0, sampling_seed=1, top_k=3), hot),
        ]
    return tuple(found)


def completion_variations(prompt: str, tokens: int, greedy: Answer, seeded: bool) -> tuple[Variation, ...]:
    """The same for OpenAI's API, which evals use; `greedy` answers `completion_probe("completion", prompt, tokens)`."""
    base = completion_probe("completion", prompt, tokens)
    found = [Variation(completion_probe("completion max_tokens", prompt, tokens // 3), base)]
    if stop := a_stop(greedy.text or ""):
        found.append(Variation(completion_probe("completion stop", prompt, tokens, stop=[stop]), base))
    if seeded:
        hot = completion_probe("completion temperature", prompt, tokens, temperature=1.0, seed=1)
        found += [
            Variation(hot, base),
            Variation(completion_probe("completion seed", prompt, tokens, temperature=1.0, seed=2), hot),
            Variation(completion_probe("completion top_p", prompt, tokens, temperature=1.0, seed=1, top_p=0.5), hot),
        ]
    return tuple(found)


def parameter_round(
    ids: Sequence[int], text: str, answer: Callable[[Probe], Answer], seeded: bool, prompt_logprobs: bool
) -> tuple[tuple[Variation, ...], Round]:
    """All variations of request parameters, and the round that sends them; `answer`: a monolithic server's to a probe."""
    text, size = text[:PARAMETER_TEXT], PARAMETER_TOKENS
    greedy, completion = generate_probe("greedy", ids, size), completion_probe("completion", text, size)
    variations = (
        *generate_variations(ids, size, answer(greedy), seeded, prompt_logprobs),
        *completion_variations(text, size, answer(completion), seeded),
    )
    return variations, Round("request parameters", tuple(each.probe for each in variations), len(variations))
