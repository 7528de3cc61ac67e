"""Models that hand their blocks a function made anew in each forward, as Qwen-Image 2.1 hands them its attention; importable, since the
builder process needs them."""
from __future__ import annotations

import torch
import torch.nn.functional as F


def attend(q, k, v, mask=None, transformer_options=None):
    if transformer_options is not None and "no_attention" in transformer_options:
        return q
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x, attn_fn, prefix=0, transformer_options=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x[:, prefix:].add_(self.out(attn_fn(q, k, v))[:, prefix:])
        return x


class Cache:
    """Keys of a prefix, by block."""

    def __init__(self):
        self.kept = {}

    def put(self, index, k):
        self.kept[index] = k.clone()


def causal(segments, transformer_options, cache, index):
    """index, of the block, is read only with a cache."""
    def attention(q, k, v):
        if cache is not None:
            cache.put(index, k)
        parts = [attend(q[:, start:end], k[:, :end], v[:, :end], mask, transformer_options) for start, end, mask in segments]
        return torch.cat(parts, dim=1)
    return attention


def with_prefix(keys, transformer_options, scale=None):
    def attention(q, k, v, *, factor=scale):
        together = torch.cat([keys, k], dim=1)
        attended = attend(q, together, together, transformer_options=transformer_options)
        return attended if factor is None else attended * factor
    return attention


class Net(torch.nn.Module):
    """attention: makes the function of a block from (net, number of the block, text, options)."""

    def __init__(self, attention, width: int = 32, depth: int = 4):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(width) for _ in range(depth)])
        self.foreign = torch.nn.LayerNorm(width)
        self.attention = attention

    def forward(self, x, text, **options):
        x = torch.cat([text, x], dim=1)
        for index, block in enumerate(self.blocks):
            options["block_index"] = index
            x = block(x, self.attention(self, index, text, options), 0, options)
        return x


def masked(net, index, text, options):
    length = text.shape[1]
    return causal([(0, length, torch.ones(length, length, dtype=torch.bool).tril()), (length, 2 * length, None)], options, None, index)


def prefixed(net, index, text, options):
    return with_prefix(text, options)


def scaled(net, index, text, options):
    return with_prefix(text, options, 0.5)


def scaled_by_tensor(net, index, text, options):
    return with_prefix(text, options, text.mean())


def normed(net, index, text, options):
    norm = net.blocks[index].norm
    return lambda q, k, v: norm(attend(q, k, v))


def normed_elsewhere(net, index, text, options):
    norm = net.foreign
    return lambda q, k, v: norm(attend(q, k, v))


def numbered(net, index, text, options):
    return lambda q, k, v: attend(q, k, v) * (index % 2 + 1)


def nested(net, index, text, options):
    inner = with_prefix(text, options)
    return lambda q, k, v: inner(k, q, v)


def cached(net, index, text, options):
    return causal([(0, 2 * text.shape[1], None)], options, net.cache, index)


def counted(net, index, text, options):
    seen = net.seen

    def attention(q, k, v):
        seen.append(q.shape[1])
        return attend(q, k, v)
    return attention


def rebinding(net, index, text, options):
    calls = 1

    def attention(q, k, v):
        nonlocal calls
        calls += 1
        return attend(q, k, v) * calls
    return attention


def make(attention):
    torch.manual_seed(0)
    net = Net(attention).eval().requires_grad_(False)
    net.cache, net.seen = Cache(), []
    return net
