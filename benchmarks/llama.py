"""A Llama in plain torch, with fused projections and a static cache, whose linear layers are given: what the benchmarks
of whole models run. Between the layers it has kernels of its own on a GPU (glue.cu), so that a step's time is the
layers'."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import nvrtc

Layer = Callable[[Tensor], Tensor]
# (name, K, N) -> the layer.
MakeLayer = Callable[[str, int, int], Layer]


class Config(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 128256
    base: float = 500000.0
    eps: float = 1e-5

    def part(self, parts: int) -> Config:
        """What one of so many processes has of it: the residual stream stays whole."""
        heads, kv_heads, intermediate = self.heads // parts, self.kv_heads // parts, self.intermediate // parts
        return self._replace(heads=heads, kv_heads=kv_heads, intermediate=intermediate)


LLAMA_3_8B = Config(4096, 14336, 32, 32, 8)
LLAMA_3_70B = Config(8192, 28672, 80, 64, 8)


def layer_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(K, N) of a block's linear layers."""
    heads = config.heads * config.head_dim
    return {
        "qkv": (config.hidden, heads + 2 * config.kv_heads * config.head_dim),
        "o": (heads, config.hidden),
        "gate_up": (config.hidden, 2 * config.intermediate),
        "down": (config.intermediate, config.hidden),
    }


class Cache:
    """Keys and values of `batch` sequences that are equally long, and where the next token goes."""

    def __init__(self, config: Config, batch: int, capacity: int, device: str, dtype: torch.dtype) -> None:
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        half = config.head_dim // 2
        frequencies = config.base ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(capacity, dtype=torch.float64)[:, None] * frequencies
        self.turns = torch.stack((angles.cos(), angles.sin()), -1).float().to(device)
        self.capacity = capacity


class TorchGlue:
    """What lies between the layers, in torch. x is the residual stream [rows, hidden], which add_norm changes."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            x += delta
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def turn_and_store(self, qkv: Tensor, cache: Cache, layer: int, config: Config, batch: int, tokens: int) -> Tensor:
        split = qkv.view(batch, tokens, -1, config.head_dim).transpose(1, 2)
        place = cache.place + torch.arange(tokens, device=qkv.device)
        cosine, sine = cache.turns[place].unbind(-1)
        q, k, v = split.split((config.heads, config.kv_heads, config.kv_heads), 1)
        q, k = (
            torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1).to(qkv.dtype)
            for low, high in (t.float().chunk(2, -1) for t in (q, k))
        )
        cache.keys[layer].index_copy_(2, place, k)
        cache.values[layer].index_copy_(2, place, v)
        return q

    def attend(self, qkv: Tensor, cache: Cache, layer: int, config: Config, batch: int) -> Tensor:
        """Of one new token each, which the caches have afterwards."""
        q, end = self.turn_and_store(qkv, cache, layer, config, batch, 1), int(cache.place) + 1
        keys, values = (held[layer][:, :, :end] for held in (cache.keys, cache.values))
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).flatten(1)

    def gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    def pick(self, tokens: Tensor, logits: Tensor, cache: Cache) -> None:
        """The end of a step: the likeliest token of each sequence into tokens [batch, 1], the cache a place further."""
        tokens.copy_(logits.argmax(-1, keepdim=True))
        cache.place.add_(1)


class CudaGlue(TorchGlue):
    """The same by glue.cu, in fp16, heads of 128 values."""

    SOURCE = Path(__file__).with_name("glue.cu")
    KERNELS = ("add_norm", "turn_and_store", "attend_1", "attend_4", "gate", "pick")
    MOST_SEQUENCES = 64

    def __init__(self) -> None:
        self._kernels = nvrtc.Kernels(self.SOURCE, self.KERNELS)
        self._overlap = torch.cuda.get_device_capability() >= (9, 0)
        self._best, self._done = (
            torch.zeros(self.MOST_SEQUENCES, dtype=dtype, device="cuda") for dtype in (torch.int64, torch.int32)
        )

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *values: Tensor | c_int | None) -> None:
        words = (c_void_p(v.data_ptr()) if isinstance(v, Tensor) else c_void_p() if v is None else v for v in values)
        self._kernels.launch(name, grid, threads, *words, overlap=self._overlap)

    def add_norm(self, x, delta, weight, eps):
        out, n = torch.empty_like(x), x.shape[-1]
        threads = -(-n // 256) * 32
        self._launch("add_norm", (x.shape[0],), threads, out, x, delta, weight, c_int(n), c_float(eps))
        return out

    def turn_and_store(self, qkv, cache, layer, config, batch, tokens):
        q = qkv.new_empty(batch, config.heads, tokens, config.head_dim)
        sizes = map(c_int, (tokens, config.heads, config.kv_heads, cache.capacity))
        grid = (config.heads + 2 * config.kv_heads, batch * tokens)
        tensors = (q, cache.keys[layer], cache.values[layer], qkv, cache.turns, cache.place)
        self._launch("turn_and_store", grid, config.head_dim // 2, *tensors, *sizes)
        return q

    def attend(self, qkv, cache, layer, config, batch):
        out = qkv.new_empty(batch, config.heads * config.head_dim)
        sizes = map(c_int, (config.heads, config.kv_heads, cache.capacity))
        tensors = (out, cache.keys[layer], cache.values[layer], qkv, cache.turns, cache.place)
        # Blocks that read the keys of four heads at once, where there are enough of them.
        queries = 4 if config.heads // config.kv_heads % 4 == 0 and batch * config.heads >= 256 else 1
        grid = (config.heads // queries, batch)
        self._launch(f"attend_{queries}", grid, 512, *tensors, *sizes, c_float(config.head_dim**-0.5))
        return out

    def gate(self, both):
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        rows, n = out.shape
        self._launch("gate", (-(-n // 2048), rows), 256, out, both, c_int(n))
        return out

    def pick(self, tokens, logits, cache):
        rows, n = logits.shape
        assert rows <= self.MOST_SEQUENCES
        assert n % 8 == 0
        grid = (-(-n // 8192), rows)
        self._launch("pick", grid, 1024, tokens, cache.place, self._best, self._done, logits, c_int(n))


class Llama:
    def __init__(
        self,
        config: Config,
        make: MakeLayer,
        *,
        embedding: Tensor,
        head: Layer,
        norms: Tensor,
        glue: TorchGlue,
    ) -> None:
        """embedding [vocab, hidden], norms [2 * layers + 1, hidden]."""
        self.config, self.embedding, self.head, self.norms = config, embedding, head, norms
        self.glue = glue
        shapes = layer_shapes(config).items()
        self.blocks = [{name: make(f"{i}.{name}", *shape) for name, shape in shapes} for i in range(config.layers)]

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        """tokens [batch, count] -> logits [batch, vocab] after the last. One token each continues what the cache holds,
        several begin it. cache.place stays: whoever calls moves it on."""
        return self.head(self.hidden(F.embedding(tokens, self.embedding), cache))

    def hidden(self, x: Tensor, cache: Cache) -> Tensor:
        """x [batch, count, hidden], which is changed -> what the head sees of the last of each, [batch, hidden]."""
        config, glue = self.config, self.glue
        batch, count, hidden = x.shape
        x, delta = x.reshape(-1, hidden), None
        for i, block in enumerate(self.blocks):
            qkv = block["qkv"](glue.add_norm(x, delta, self.norms[2 * i], config.eps))
            attended = (
                glue.attend(qkv, cache, i, config, batch)
                if count == 1
                else self._attend_all(qkv, cache, i, batch, count)
            )
            delta = block["o"](attended)
            both = block["gate_up"](glue.add_norm(x, delta, self.norms[2 * i + 1], config.eps))
            delta = block["down"](glue.gate(both))
        last = slice(count - 1, None, count)
        x, delta = (x, delta) if count == 1 else (x[last].contiguous(), delta[last].contiguous())
        return glue.add_norm(x, delta, self.norms[-1], config.eps)

    def _attend_all(self, qkv: Tensor, cache: Cache, layer: int, batch: int, count: int) -> Tensor:
        q = self.glue.turn_and_store(qkv, cache, layer, self.config, batch, count)
        keys, values = (held[layer][:, :, :count] for held in (cache.keys, cache.values))
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch * count, -1)
