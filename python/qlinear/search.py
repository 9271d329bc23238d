"""Scales for round-to-nearest that leave less error than the plain range of a group.

A group's largest weights are few: a range that clips them a little makes the step of all the others smaller. This tries
some such ranges for each group and keeps the one with the least sum of squared errors (GPTQ calls the idea "mse"). A
code of uneven steps, as FP4, gains from wider ranges as well: they bring its close values to where most weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINK = tuple(1 - 0.02 * i for i in range(16))
STRETCH = tuple(1.5 - 0.02 * i for i in range(50))

# Weights at a time: what is computed on the way to the error stays in the CPU's cache, and fills a GPU.
_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 24


def _rows_at_a_time(weight: Tensor, length: int) -> int:
    return max(1, (_GPU_CHUNK if weight.is_cuda else _CHUNK) // max(length, 1))


def find_params(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """weight float [N, K] -> (scales fp32 [N, G], which fp16 holds exactly, zeros fp32 [N, G])."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    scales = torch.empty(n, groups, device=weight.device)
    zeros = torch.empty(n, groups, device=weight.device)
    rows = _rows_at_a_time(weight, k)
    for start in range(0, n, rows):
        chunk = weight[start : start + rows].detach().float()
        # The last group may be short; zeros are in every range and have no error.
        chunk = torch.nn.functional.pad(chunk, (0, groups * size - k)).reshape(-1, groups, size)
        scales[start : start + rows], zeros[start : start + rows] = _best(chunk, 2**bits - 1)
    return scales, zeros


def _best(chunk: Tensor, maxq: int) -> tuple[Tensor, Tensor]:
    """chunk [rows, G, size] -> (scales, zeros) [rows, G]."""
    low, high = chunk.amin(-1).clamp_(max=0), chunk.amax(-1).clamp_(min=0)
    least = torch.full_like(low, torch.inf)
    # What stays where no error is a number: NaN and infinities are seen in the scale.
    scales, zeros = (high - low) / maxq, torch.zeros_like(low)
    for shrink in SHRINK:
        # The scale that is stored: the error is that of the packed weight.
        scale = ((high - low) * (shrink / maxq)).half().float()
        scale = torch.where(scale > 0, scale, 1)
        zero = (-low * shrink / scale).round_().clamp_(0, maxq)
        wide, shift = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = chunk.div(wide).add_(shift).round_().clamp_(0, maxq).sub_(shift).mul_(wide).sub_(chunk)
        error = error.square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def quantize_4bit(weight: Tensor, code: Tensor, *, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight float, code fp32 [16] -> (packed uint8 [(n + 1) // 2, 1], absmax fp32 [blocks]), in the storage of
    functional.quantize_4bit: blocks along the flat weight, the first of two values in the high nibble."""
    flat = weight.detach().reshape(-1)
    count = -(-flat.numel() // blocksize)
    absmax = torch.empty(count, device=weight.device)
    indices = torch.empty(count, blocksize, dtype=torch.uint8, device=weight.device)
    values, order = code.sort()
    between = (values[1:] + values[:-1]) / 2
    step = _rows_at_a_time(weight, blocksize)
    for start in range(0, count, step):
        chunk = flat[start * blocksize : (start + step) * blocksize].float()
        chunk = torch.nn.functional.pad(chunk, (0, -chunk.numel() % blocksize)).reshape(-1, blocksize)
        best = absmax[start : start + step]
        best.copy_(_best_absmax(chunk, values, between))
        scaled = chunk / torch.where(best > 0, best, 1).unsqueeze(-1)
        indices[start : start + step] = order[torch.bucketize(scaled, between)].to(torch.uint8)
    nibbles = torch.nn.functional.pad(indices.reshape(-1)[: flat.numel()], (0, flat.numel() % 2)).reshape(-1, 2)
    return (nibbles[:, :1] << 4) | nibbles[:, 1:], absmax


def _best_absmax(chunk: Tensor, values: Tensor, between: Tensor) -> Tensor:
    """chunk [blocks, blocksize], the code's values in order and the thresholds between them -> absmax [blocks]."""
    most = chunk.abs().amax(-1)
    least, absmax = torch.full_like(most, torch.inf), most.clone()
    for stretch in STRETCH:
        candidate = most * stretch
        wide = torch.where(candidate > 0, candidate, 1).unsqueeze(-1)
        error = (values[torch.bucketize(chunk / wide, between)] * wide - chunk).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        absmax = torch.where(better, candidate, absmax)
    return absmax
