"""Scales for round-to-nearest that leave less error than the plain range of a group.

A group's largest weights are few: a range that clips them a little makes the step of all the others smaller. This tries
some such ranges for each group and keeps the one with the least sum of squared errors (GPTQ calls the idea "mse").
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINK = tuple(1 - 0.02 * i for i in range(16))

# Weights at a time: what is computed on the way to the error stays in the cache.
_CHUNK = 1 << 16


def find_params(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """weight float [N, K] -> (scales fp32 [N, G], which fp16 holds exactly, zeros fp32 [N, G])."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    scales = torch.empty(n, groups, device=weight.device)
    zeros = torch.empty(n, groups, device=weight.device)
    rows = max(1, _CHUNK // max(k, 1))
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
