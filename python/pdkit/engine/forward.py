"""The forward pass of transformers' DeepSeek-V4 in a third of its operations, for models so small that these are the time.

What stands side by side in the model (projections of one input, experts, the heads' key and value) is one product here;
the rest is the model's arithmetic, on the model's own cache. `test_engine_model_runner.py` compares both. B rows of S
tokens each, all rows at the same position, H heads of D, T tokens or compressed entries that there are to see.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


def _number(value: float) -> Tensor:
    """`value` in float32: torch makes one of a Python number each time, which takes longer than what it is used for."""
    return torch.tensor(value, dtype=torch.float32)


def _scale(x: Tensor, eps: Tensor) -> Tensor:
    """[..., 1]: what a row of x is multiplied with to have a mean square of one. A fifth of rms_norm's operations."""
    return torch.add(eps, (x * x).sum(-1, keepdim=True), alpha=1 / x.shape[-1]).rsqrt_()


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved rotary embedding of x [..., D], in place: its last 2 * R, as R complex numbers, times turn [..., R]."""
    pairs = x[..., x.shape[-1] - 2 * turn.shape[-1] :]
    torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2)).mul_(turn)
    return x


def _after(before: Tensor | None, x: Tensor) -> Tensor:
    return x if before is None else torch.cat([before, x], dim=1)


class _Compressor:
    """Makes an entry of each `rate` tokens; with overlap, of the `rate` before them, too."""

    def __init__(self, module: Any, name: str) -> None:
        self.name, self.rate, self.width = name, module.compress_rate, module.head_dim
        self.bias, self.norm = module.position_bias, module.kv_norm.weight
        self.eps = _number(module.kv_norm.variance_epsilon)
        self.overlaps = self.bias.shape[1] == 2 * self.width
        self.projections = [module.kv_proj.weight, module.gate_proj.weight]

    def __call__(self, layer: Any, kv: Tensor, gate: Tensor, turns: Tensor) -> Tensor:
        """All entries [B, T, D] after more tokens, whose projections [B, S, D or 2 D] are `kv` and `gate`."""
        name, rate = self.name, self.rate
        kv, gate = _after(layer.buffer_kv[name], kv), _after(layer.buffer_gate[name], gate)
        count = kv.shape[1] // rate
        layer.buffer_kv[name], layer.buffer_gate[name] = kv, gate
        if count:
            layer.buffer_kv[name], layer.buffer_gate[name] = kv[:, count * rate :], gate[:, count * rate :]
            kv, gate = (x[:, : count * rate].unflatten(1, (count, rate)) for x in (kv, gate))
            gate = gate + self.bias
            if self.overlaps:
                kv = self._with_those_before(layer.overlap_kv, kv, 0.0)
                gate = self._with_those_before(layer.overlap_gate, gate, -torch.inf)
            entries = (kv * gate.softmax(2)).sum(2)
            first = layer.entry_count[name] * rate
            entries = _turned(
                entries * _scale(entries, self.eps) * self.norm, turns[first : first + count * rate : rate]
            )
            layer.compressed_kv[name] = _after(layer.compressed_kv[name], entries)
            layer.entry_count[name] += count
        elif layer.compressed_kv[name] is None:
            layer.compressed_kv[name] = kv.new_zeros(len(kv), 0, self.width)
        found: Tensor = layer.compressed_kv[name]
        return found

    def _with_those_before(self, kept: dict[str, Tensor | None], x: Tensor, nothing: float) -> Tensor:
        """x [B, n, rate, 2 D] -> [B, n, 2 rate, D]: the first half of the window before, the second half of each."""
        first, second = x.split(self.width, dim=-1)
        before, kept[self.name] = kept[self.name], first[:, -1]
        if before is None:
            before = torch.full_like(first[:, 0], nothing)
        return torch.cat([torch.cat([before.unsqueeze(1), first[:, :-1]], dim=1), second], dim=2)


class _Attention:
    def __init__(self, module: Any, norm: Any, turns: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.turns, self.back = turns[module.rope_layer_type]
        self.heads, self.width, self.window = module.num_heads, module.head_dim, module.sliding_window
        self.scaling, self.eps = _number(module.scaling), _number(module.q_b_norm.eps)
        self.sinks = module.sinks.view(-1, 1)
        self.norms = torch.ones(self.heads + 1, self.width)
        self.norms[-1] = module.kv_norm.weight
        projections, queries = [module.q_a_proj.weight, module.kv_proj.weight], [module.q_b_proj.weight]
        self.compressor = self.indexer = None
        if module.compressor is not None:
            self.compressor = _Compressor(module.compressor, "compressor")
            projections += self.compressor.projections
            indexer = getattr(module.compressor, "indexer", None)
            if indexer is not None:
                self.indexer, self.top = _Compressor(indexer, "indexer"), indexer.index_topk
                projections += [*self.indexer.projections, indexer.scorer.weights_proj.weight]
                queries.append(indexer.q_b_proj.weight)
        self.sizes = [len(weight) for weight in projections]
        self.projections = (torch.cat(projections) * norm.weight).t()
        self.queries = (torch.cat(queries) * module.q_a_norm.weight).t()
        groups = module.o_a_proj.weight.chunk(module.o_a_proj.n_groups)
        self.output = (module.o_b_proj.weight @ torch.block_diag(*groups)).t()

    def __call__(self, x: Tensor, length: int, layer: Any, start: int, outside: Tensor | None) -> Tensor:
        """x [B * S, hidden] -> the same. outside [S, T]: tokens that a query does not see; None for a single one."""
        rows, heads = len(x) // length, self.heads
        low, kv, *parts = torch.mm(x, self.projections).split_with_sizes(self.sizes, 1)
        queries = torch.mm(low * _scale(low, self.eps), self.queries)
        turn, back = (turns[start : start + length].unsqueeze(1) for turns in (self.turns, self.back))
        both = torch.cat([queries[:, : heads * self.width], kv], dim=1).view(rows, length, heads + 1, -1)
        q, kv = _turned((both * _scale(both, self.eps)).mul_(self.norms), turn).split_with_sizes([heads, 1], 2)
        to_see, tokens = [kv[:, :, 0]], length
        if layer.is_initialized:
            to_see.insert(0, layer.keys[:, 0])
            tokens += layer.keys.shape[2]
        else:
            layer.lazy_initialization(kv.transpose(1, 2), kv.transpose(1, 2))
        layer.cumulative_length += length
        hidden, chosen = outside, None
        if self.compressor is not None:
            parts = [part.view(rows, length, -1) for part in parts]
            entries = self.compressor(layer, parts[0], parts[1], self.turns)
            if self.indexer is not None:
                keys = self.indexer(layer, parts[2], parts[3], self.turns)
                entries = entries[:, : (start + length) // self.compressor.rate]
            late = None
            if outside is not None:
                complete = torch.arange(start + 1, start + length + 1) // self.compressor.rate
                late = torch.arange(entries.shape[1]) >= complete.unsqueeze(1)
                hidden = torch.cat([outside, late], dim=1)
            if self.indexer is not None and entries.shape[1] > self.top:
                asked = queries[:, heads * self.width :].view(rows, length, -1, self.indexer.width)
                chosen = self._chosen(_turned(asked, turn), keys[:, : entries.shape[1]], parts[4], late)
            to_see.append(entries)
        seen = torch.cat(to_see, dim=1)
        window = seen[:, max(0, tokens - self.window + 1) : tokens].unsqueeze(1)
        layer.keys = layer.values = window if length == 1 else window.clone()  # a prefix cache would keep all of `seen`
        scores = torch.bmm((q * self.scaling).reshape(rows, length * heads, -1), seen.transpose(1, 2))
        scores = scores.view(rows, length, heads, -1)
        if chosen is not None:
            scores[..., -chosen.shape[-1] :] += chosen.unsqueeze(2)
        if hidden is not None:
            scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)
        shares = torch.cat([scores, self.sinks.expand(rows, length, -1, -1)], dim=-1).softmax(-1).flatten(1, 2)
        seen = torch.bmm(shares[..., :-1], seen).view(rows, length, heads, -1)
        return torch.mm(_turned(seen, back).view(rows * length, -1), self.output)

    def _chosen(self, asked: Tensor, keys: Tensor, weights: Tensor, late: Tensor | None) -> Tensor:
        """[B, S, T]: 0 for the entries that the indexer picks, else -inf. Of late ones it may pick, where few are not."""
        found = torch.bmm(asked.flatten(1, 2), keys.transpose(1, 2)).relu().view(*asked.shape[:3], -1)
        scores = torch.matmul(weights.unsqueeze(2), found).squeeze(2)
        if late is not None:
            scores.masked_fill_(late, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter_(2, scores.topk(self.top, dim=2).indices, 0.0)


class _Experts:
    """The routed ones, all of them, and the shared one, as a single gated layer."""

    def __init__(self, module: Any, norm: Any) -> None:
        routed, shared, self.router = module.experts, module.shared_experts, module.gate
        gates, ups = routed.gate_up_proj.chunk(2, dim=1)
        self.routed = routed.num_experts, gates.shape[1]
        projections = [*gates, shared.gate_proj.weight, *ups, shared.up_proj.weight, self.router.weight]
        self.projections = (torch.cat(projections) * norm.weight).t()
        self.inner = (self.projections.shape[1] - routed.num_experts) // 2
        self.down = torch.cat([*routed.down_proj, shared.down_proj.weight], dim=1).t()
        self.limit, self.fixed = routed.limit, getattr(self.router, "tid2eid", None)
        self.activation, self.score = routed.act_fn.forward, self.router.score_fn.forward
        self.tiny, self.scaling = _number(1e-20), _number(self.router.routed_scaling_factor)

    def __call__(self, x: Tensor, tokens: Tensor) -> Tensor:
        experts, width = self.routed
        gates, ups, logits = torch.mm(x, self.projections).split_with_sizes([self.inner, self.inner, experts], 1)
        scores, router = self.score(logits), self.router
        if self.fixed is None:
            chosen = (scores + router.e_score_correction_bias).topk(router.top_k, dim=-1, sorted=False).indices
        else:
            chosen = self.fixed[tokens].long()
        weights = scores.gather(1, chosen)
        weights.div_(weights.sum(-1, keepdim=True).add_(self.tiny)).mul_(self.scaling)
        mix = torch.zeros_like(scores).scatter_add_(1, chosen, weights)
        inner = self.activation(gates.clamp_(max=self.limit)).mul_(ups.clamp_(-self.limit, self.limit))
        inner[:, : experts * width].view(-1, experts, width).mul_(mix.unsqueeze(2))
        return torch.mm(inner, self.down)


class _Streams:
    """Hyper-connections around a block: what it reads of the streams, and how its output goes back to them."""

    def __init__(self, module: Any, norm: Any) -> None:
        self.count, self.eps, self.rounds = module.hc_mult, _number(module.hc_eps), module.hc_sinkhorn_iters
        scales = module.scale.repeat_interleave(torch.tensor([self.count, self.count, self.count**2]))
        self.weight, self.base = (module.fn * scales.unsqueeze(1)).t(), module.base
        self.flat_eps, self.norm_eps = _number(module.input_norm.eps), _number(norm.variance_epsilon)
        self.two = _number(2.0)

    def __call__(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [B, n, hidden] -> (the block's input [B, hidden], shares of its output [B, n, 1], mix [B, n, n]).

        The weight of the norm of the input is in the block's projections.
        """
        count, eps, flat = self.count, self.eps, streams.flatten(1)
        weights = torch.addcmul(self.base, torch.mm(flat, self.weight), _scale(flat, self.flat_eps))
        gates, mix = weights.split_with_sizes([2 * count, count * count], 1)
        reads, writes = gates.sigmoid().split_with_sizes([count, count], 1)
        mix = mix.view(-1, count, count).softmax(-1).add_(eps)
        for dim in (-2, *(-1, -2) * (self.rounds - 1)):
            mix.div_(mix.sum(dim, keepdim=True).add_(eps))
        x = torch.bmm(reads.add_(eps).unsqueeze(1), streams).squeeze(1)
        return x * _scale(x, self.norm_eps), writes.mul_(self.two).unsqueeze(2), mix.transpose(1, 2)


class Forward:
    """`model`: a DeepseekV4ForCausalLM in eval mode, whose weights stay as they are."""

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        config, inside = model.config, model.model
        assert not config.mlp_bias, "projections with a bias are not served"
        positions = torch.arange(config.max_position_embeddings + config.sliding_window).unsqueeze(0)
        embeddings = {kind: inside.rotary_emb(inside.norm.weight, positions, kind) for kind in ("main", "compress")}
        turns = {
            kind: (torch.complex(cos[0], sin[0]), torch.complex(cos[0], -sin[0]))
            for kind, (cos, sin) in embeddings.items()
        }
        self.embedding, self.count, self.window = inside.embed_tokens.weight, config.hc_mult, config.sliding_window
        self.layers = [
            (
                _Streams(layer.attn_hc, layer.input_layernorm),
                _Attention(layer.self_attn, layer.input_layernorm, turns),
                _Streams(layer.ffn_hc, layer.post_attention_layernorm),
                _Experts(layer.mlp, layer.post_attention_layernorm),
            )
            for layer in inside.layers
        ]
        self.head, self.norm = inside.hc_head, inside.norm

    def __call__(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """tokens [B, S], the next of each row of `cache`, which goes on. Returns what `lm_head` takes, [B, S, hidden]."""
        (rows, length), start = tokens.shape, cache.get_seq_length()
        outside = None
        if length > 1:
            ages = torch.arange(length).unsqueeze(1) - torch.arange(-min(start, self.window - 1), length)
            outside = (ages < 0) | (ages >= self.window)
        flat = tokens.flatten()
        streams = self.embedding[flat].unsqueeze(1).repeat(1, self.count, 1)
        for layer, (before_attention, attention, before_experts, experts) in zip(cache.layers, self.layers):
            x, shares, mix = before_attention(streams)
            x = attention(x, length, layer, start, outside)
            streams = (shares * x.unsqueeze(1)).baddbmm_(mix, streams)
            x, shares, mix = before_experts(streams)
            streams = (shares * experts(x, flat).unsqueeze(1)).baddbmm_(mix, streams)
        hidden: Tensor = self.norm(self.head(streams.view(rows, length, self.count, -1)))
        return hidden
