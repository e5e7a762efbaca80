"""EAGLE: the operators of sgl_kernel's CPU build that SGLang imports, and a cleanup kernel.

sgl_kernel is replaced as a package (assets/sglang-cpu-site/sgl_kernel), which takes these functions by name. Their arguments are those of
kernels/ops/speculative/{spec_tree,eagle,cache_locs}.py; results go into tensors that the caller made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import replaces

FULL_MASK, DRAFT_MASK = 0, 1  # of TreeMaskMode: over all tokens, and over the draft tokens only


@replaces(
    "sglang.srt.mem_cache.deepseek_v4_memory_pool:clear_unaccepted_c128_draft_states",
    family="speculative",
    imitates=("kernels/ops/kvcache/dsv4_c128_cleanup.py",),
)
def clear_unaccepted_c128_draft_states(
    state: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    accept_lens: Tensor,
    *,
    ring_size: int,
    num_draft_tokens: int,
) -> None:
    """the ring slots of draft tokens that were not accepted: keys 0, scores -inf

    state [..., 2d]; the others [batch]: request, length before the draft, how many draft tokens were accepted
    """
    half = state.shape[-1] // 2
    rows = state.view(-1, 2 * half)
    draft = torch.arange(num_draft_tokens)
    where = req_pool_indices.long()[:, None] * ring_size + (seq_lens.long()[:, None] + draft) % ring_size
    rejected = where[draft >= accept_lens.long()[:, None]]
    rows[rejected, :half] = 0
    rows[rejected, half:] = float("-inf")


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """The tree of draft tokens of each sequence, from which token is whose parent. Draft token 0 is the sure one.

    parent_list [batch, ...], selected_index [batch, draft_token_num - 1] -> retrieve_* [batch, draft_token_num],
    positions [batch * draft_token_num], tree_mask (flat; see FULL_MASK, DRAFT_MASK)
    """
    n = draft_token_num
    starts = (torch.cumsum(verified_seq_len, 0) - verified_seq_len).tolist()
    for b, length in enumerate(verified_seq_len.tolist()):
        chosen = selected_index[b].tolist()
        parents = (parent_list[b] if parent_list.dim() > 1 else parent_list).tolist()

        def parent(i: int, chosen: list[int] = chosen, parents: list[int] = parents) -> int | None:
            """Position in the tree of the parent of draft token i > 0; None where it was not chosen."""
            at = chosen[i - 1] // topk
            return 0 if at == 0 else chosen.index(parents[at]) + 1 if parents[at] in chosen else None

        retrieve_index[b] = torch.arange(b * n, b * n + n)
        for i in range(n - 1, 0, -1):
            p = parent(i)
            if p is not None:
                if retrieve_next_token[b, p] != -1:
                    retrieve_next_sibling[b, i] = retrieve_next_token[b, p]
                retrieve_next_token[b, p] = i
        for i in range(n):
            row = torch.zeros(n, dtype=torch.bool)
            row[0] = True
            at, steps = i, 0
            while at and steps < depth:
                row[at], steps = True, steps + 1
                at = parent(at) or 0
            positions[b * n + i] = length + steps
            if int(tree_mask_mode) == FULL_MASK:
                first = n * n * b + starts[b] * n + (length + n) * i + length
            elif int(tree_mask_mode) == DRAFT_MASK:
                first = n * n * b + n * i
            else:
                raise NotImplementedError(f"tree mask mode {tree_mask_mode}: the CPU shims have 0 and 1 only")
            tree_mask[first : first + n] = row


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Which draft tokens the model itself would have taken; candidates, retrive_*, target_predict [batch, drafts]."""
    target = target_predict.flatten()
    for b in range(candidates.shape[0]):
        last, at, accepted = int(retrive_index[b, 0]), 0, 0
        accept_index[b, 0] = last
        for _ in range(1, accept_index.shape[1]):
            want = int(target[last])
            at = int(retrive_next_token[b, at])
            while at != -1 and int(candidates[b, at]) != want:
                at = int(retrive_next_sibling[b, at])
            if at == -1:
                break
            predicts[last] = want
            last, accepted = int(retrive_index[b, at]), accepted + 1
            accept_index[b, accepted] = last
        accept_token_num[b] = accepted
        predicts[last] = target[last].to(predicts.dtype)


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, stride: int) -> None:
    """The last accepted token of each sequence: accept_tokens [batch * stride], accept_lens [batch]."""
    rows = torch.arange(accept_lens.shape[0])
    bonus_tokens.copy_(accept_tokens.flatten()[rows * stride + accept_lens.long() - 1])


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor) -> None:
    """Slots of the accepted tokens, in order; accept_index: positions of them, -1 for none."""
    kept = accept_index.flatten()
    kept = kept[kept > -1].long()
    accept_out_cache_loc[: kept.numel()] = out_cache_loc[kept].to(accept_out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    _pool_len: int,
    topk: int,
    steps: int,
) -> None:
    """Slots of the tokens that follow each sequence, topk * steps of them."""
    at = seq_lens.long()[:, None] + torch.arange(topk * steps)
    out_cache_loc.view(-1)[:] = req_to_token[req_pool_indices.long()[:, None], at].flatten().to(out_cache_loc.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor, _pool_len: int
) -> None:
    """Slots of positions `start` to `end` of each sequence, one sequence after the other."""
    parts = [req_to_token[int(r), int(a) : int(b)] for r, a, b in zip(req_pool_indices, start, end)]
    if parts:
        found = torch.cat(parts)
        out_cache_loc[: found.numel()] = found.to(out_cache_loc.dtype)


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor, _pool_len: int
) -> None:
    """The reverse of `assign_extend_cache_locs_cpu`: slots are entered for positions `start` to `end`."""
    at = 0
    for r, a, b in zip(req_pool_indices.tolist(), start.tolist(), end.tolist()):
        req_to_token[r, a:b] = out_cache_loc[at : at + b - a].to(req_to_token.dtype)
        at += b - a
