"""A stand-in for PyTorch's memory-efficient attention, which exists on GPUs alone.

It refuses what the kernel refuses (PyTorch's attention.cu, and `check_supported` in kernel_forward.h, or more) and
computes in base 2 as that does, so a mask that overflows there overflows here.
"""

import math

import torch

ALIGNMENT = 8  # elements, of 16 bits
LOG2_E = math.log2(math.e)


def efficient_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale):
    num, heads, queries, _ = query.shape
    assert query.dtype == key.dtype == value.dtype == attn_bias.dtype
    assert key.shape[:2] == value.shape[:2] == (num, heads)
    assert attn_bias.shape == (num, heads, queries, key.shape[2])
    for tensor in (query, key, value, attn_bias):
        assert tensor.stride(3) == 1
        assert tensor.data_ptr() % 16 == 0
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            assert size == 1 or stride % ALIGNMENT == 0
        assert tensor is attn_bias or tensor.stride(2) % ALIGNMENT == 0
    assert compute_log_sumexp
    assert dropout_p == 0
    assert not is_causal
    scores = (query.float() @ key.float().transpose(2, 3) * scale + attn_bias.float()) * LOG2_E
    peak = scores.amax(-1)
    peak = torch.where(peak == -math.inf, 0.0, peak)  # as the kernel does for a row that sees nothing
    weights = torch.exp2(scores - peak[..., None])
    total = weights.sum(-1)
    total = torch.where(total == 0, 1.0, total)
    output = (weights.to(value.dtype).float() @ value.float() / total[..., None]).to(query.dtype)
    log_sum_exp = torch.full((num, heads, -(-queries // 32) * 32), math.nan)
    log_sum_exp[..., :queries] = peak / LOG2_E + total.log()
    strided = torch.empty(num, queries, heads, value.shape[3], dtype=query.dtype).transpose(1, 2)
    seed = offset = torch.empty((), dtype=torch.long)
    return strided.copy_(output), log_sum_exp, seed, offset
