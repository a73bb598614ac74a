"""Quantizers: the maths of every code, scale and gradient, each formula once.

Shapes: B batch, T tokens, H heads, D head dim, O out rows, I in columns, G groups. Always multiply:
`x ≈ scale * codes (+ offset)`.

Training, packing and tests call these functions; nothing else in the project computes a scale or a code.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


TWN_THRESHOLD = 0.7  # times mean|w|: Li & Liu, Ternary Weight Networks (2016), eq. 6; TernaryBERT section 3.1
LAT_ITERATIONS = 10  # alternating steps from a cold start, as the loss-aware quantizer released with BinaryBERT
TINY = 1e-30  # floor of a scale; keeps 127 / range finite and a scale of an all-zero group positive
MIN_STEP = 1e-5  # floor of a learned step size: an update may not carry it past 0 (BiT's code)
PACT_CLIP = 2.5  # first clips of BinaryBERT's A8 (its code)
# Below these the activation functions never go: GELU's minimum is -0.16997, SiLU's -0.27846.
ACTIVATION_FLOORS = {"relu": 0.0, "gelu": -0.17, "gelu_new": -0.17, "gelu_pytorch_tanh": -0.17, "silu": -0.28}

GRANULARITIES = ("per_tensor", "per_row", "per_group")


class Quantized(NamedTuple):
    """`value ≈ codes * scale (+ offset)`; scale and offset broadcast against codes."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Float tensor of the shape of `codes`."""
        value = self.codes.to(self.scale.dtype) * self.scale
        return value if self.offset is None else value + self.offset


class StraightThrough(torch.autograd.Function):
    """Forward: the quantized value. Backward: identity to the latent tensor (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx, latent: Tensor, quantized: Tensor) -> Tensor:  # noqa: ARG004 (autograd's signature)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


# Weights


def scale_shape(rows: int, columns: int, granularity: str, group_size: int) -> tuple[int, int]:
    """Shape of the scale of an (O, I) weight: (1, 1), (O, 1) or (O, G)."""
    if granularity == "per_tensor":
        return (1, 1)
    if granularity == "per_row":
        return (rows, 1)
    return (rows, -(-columns // group_size))


def expand_scale(scale: Tensor, columns: int, group_size: int) -> Tensor:
    """Scale (1, 1), (O, 1) or (O, G) made broadcastable against (O, I)."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group_size, dim=1)[:, :columns]


def _group_sum(values: Tensor, granularity: str, group_size: int) -> Tensor:
    """Sum of (O, I) over each scale group: float64, of the shape of the scale.

    Rows and groups are summed in float64, so their means are rounded once. Of a whole matrix the rows are summed in
    the type of `values`, each by one thread, and the row sums in float64: the number of threads does not show.
    """
    if granularity == "per_group":
        rows, columns = values.shape
        padding = -columns % group_size
        return torch.nn.functional.pad(values, (0, padding)).view(rows, -1, group_size).sum(-1, dtype=torch.float64)
    if granularity == "per_row":
        return values.sum(-1, keepdim=True, dtype=torch.float64)
    return values.sum(-1).double().sum().view(1, 1)


def _group_amax(values: Tensor, granularity: str, group_size: int) -> Tensor:
    """Largest of non-negative (O, I) over each scale group, of the shape of the scale."""
    if granularity == "per_group":
        rows, columns = values.shape
        padding = -columns % group_size
        return torch.nn.functional.pad(values, (0, padding)).view(rows, -1, group_size).amax(-1)
    rows = values.amax(-1, keepdim=True)
    return rows if granularity == "per_row" else rows.amax().view(1, 1)


def _group_mean(values: Tensor, granularity: str, group_size: int) -> Tensor:
    """Mean of (O, I) over each scale group, rounded once; a row's last group may be shorter."""
    rows, columns = values.shape
    count = rows * columns if granularity == "per_tensor" else columns
    if granularity == "per_group":
        starts = torch.arange(0, columns, group_size, device=values.device)
        count = (columns - starts).clamp_max(group_size)
    return (_group_sum(values, granularity, group_size) / count).to(values.dtype)


def ternary_codes(weight: Tensor, threshold: Tensor, group_size: int) -> Tensor:
    """int8 codes {-1, 0, +1} of (O, I): sign(w) where |w| > threshold (strict), else 0."""
    threshold = expand_scale(threshold, weight.shape[1], group_size)
    return (weight > threshold).view(torch.int8) - (weight < -threshold).view(torch.int8)


def quantize_twn(weight: Tensor, granularity: str, group_size: int = 64) -> Quantized:
    """Ternary, approximation based: threshold 0.7 mean|w|, scale the mean |w| above it (TWN; TernaryBERT eq. 4-5)."""
    magnitude = weight.abs()
    codes = ternary_codes(weight, TWN_THRESHOLD * _group_mean(magnitude, granularity, group_size), group_size)
    kept = codes.to(weight.dtype)
    total = _group_sum(weight * kept, granularity, group_size)
    count = _group_sum(kept.abs_(), granularity, group_size)
    return Quantized(codes, (total / count.clamp_min(1)).to(weight.dtype).clamp_min(TINY))


def codes_from_lat_scale(weight: Tensor, scale: Tensor, group_size: int) -> Quantized:
    """Loss-aware ternary codes of a given scale: round(clip(w / scale, -1, 1)), that is |w| > scale / 2."""
    return Quantized(ternary_codes(weight, scale / 2, group_size), scale)


def lat_scale(
    weight: Tensor,
    curvature: Tensor | None,
    granularity: str,
    group_size: int,
    start: Tensor | None = None,
    iterations: int = LAT_ITERATIONS,
) -> Tensor:
    """Scale of loss-aware ternarization: alternating minimisation of sum d (scale * codes - w)^2.

    Args:
        weight: latent weight (O, I).
        curvature: d, diagonal curvature of the loss (O, I), non-negative; `None` means 1 everywhere.
        start: scale to start from; default the TWN scale.
        iterations: alternating steps; 1 or 2 suffice from the scale of the previous training step.

    Source: Hou & Kwok, Loss-aware Weight Quantization of Deep Networks (ICLR 2018), section 3; TernaryBERT eq. 6.
    A group whose curvature sums to nothing keeps its scale.
    """
    scale = quantize_twn(weight, granularity, group_size).scale if start is None else start
    for _ in range(iterations):
        kept = ternary_codes(weight, scale / 2, group_size).to(weight.dtype)
        weighted = kept if curvature is None else kept * curvature
        total = _group_sum(weighted * weight, granularity, group_size)
        mass = _group_sum(weighted.abs(), granularity, group_size)
        scale = torch.where(mass > 0, total / mass.clamp_min(TINY), scale).to(weight.dtype).clamp_min(TINY)
    return scale


def quantize_bwn(weight: Tensor, granularity: str, group_size: int = 64) -> Quantized:
    """Binary: sign(w), +1 for zero, times mean |w| (Rastegari et al., XNOR-Net (2016), eq. 6; BinaryBERT eq. 5)."""
    codes = (weight >= 0).view(torch.int8).mul(2).sub_(1)
    return Quantized(codes, _group_mean(weight.abs(), granularity, group_size).clamp_min(TINY))


def quantize_centered(weight: Tensor, granularity: str, group_size: int = 64) -> Quantized:
    """Binary: sign of w minus its group's mean, times mean |w| (BiT, Liu et al. 2022; BiBERT takes rows as groups)."""
    mean = expand_scale(_group_mean(weight, granularity, group_size), weight.shape[1], group_size)
    codes = (weight >= mean).view(torch.int8).mul(2).sub_(1)
    return Quantized(codes, _group_mean(weight.abs(), granularity, group_size).clamp_min(TINY))


def quantize_symmetric(weight: Tensor, granularity: str, group_size: int, bits: int = 8) -> Quantized:
    """Symmetric k-bit codes in ±(2^(k-1) - 1), scale max|w| / (2^(k-1) - 1) (TernaryBERT's 8-bit weights)."""
    levels = 2 ** (bits - 1) - 1
    largest = _group_amax(weight.abs(), granularity, group_size).clamp_min(TINY)
    codes = torch.round(weight * expand_scale(levels / largest, weight.shape[1], group_size))
    return Quantized(codes.to(torch.int8), largest / levels)


# name -> (bits, quantizer). "lat" keeps its scale as state: codes follow from the latent weight and that scale alone.
WEIGHT_QUANTIZERS: dict[str, tuple[int, Callable[..., Quantized]]] = {
    "bwn": (1, quantize_bwn),
    "centered": (1, quantize_centered),
    "twn": (2, quantize_twn),
    "lat": (2, codes_from_lat_scale),
    "int3": (3, partial(quantize_symmetric, bits=3)),
    "int4": (4, partial(quantize_symmetric, bits=4)),
    "int8": (8, quantize_symmetric),
}


# Activations


class ActivationQuantizer(NamedTuple):
    """Dynamic min-max quantizer of activations.

    Args:
        bits: 4 or 8 (32 is off).
        symmetric: codes in ±(2^(k-1) - 1), scale max|x| / (2^(k-1) - 1); otherwise 2^k - 1 steps between minimum and
            maximum, codes shifted by 2^(k-1) into int8 and an offset beside the scale.
        per_tensor: one range over the whole batch (the setting of the papers, in which a prediction depends on its
            batch); otherwise one per token.
    """

    bits: int
    symmetric: bool
    per_tensor: bool

    # Not `__call__`: torch.compile of torch 2.10 cannot trace that of a NamedTuple.
    def quantized(self, x: Tensor, valid: Tensor | None = None, dims: tuple[int, ...] = (-1,)) -> Quantized:
        """Quantize x over `dims`; positions where the boolean `valid` (broadcastable) is False never widen a range.

        Codes come as float tensor of whole numbers, scale and offset with `dims` kept as 1.
        """
        x = x.float()
        if self.per_tensor:
            dims = tuple(range(x.dim()))
        low, high = _masked_range(x, valid, dims, self.symmetric)
        if self.symmetric:
            levels = 2 ** (self.bits - 1) - 1
            least, most = -levels, levels
            high = high.clamp_min(TINY)
            scale, offset = high / levels, None
            codes = x * (levels / high)
        else:
            levels, least = 2**self.bits - 1, -(2 ** (self.bits - 1))
            most = least + levels
            width = (high - low).clamp_min(TINY)
            scale = width / levels
            offset = low - scale * least
            inverse = levels / width
            codes = (x * inverse).add_(least - low * inverse)
        # The last code may be passed by values that set no range, and where a narrow range far from 0 rounds the sum.
        return Quantized(codes.round_().clamp_(least, most), scale, offset)

    def quantize(
        self, x: Tensor, valid: Tensor | None = None, dims: tuple[int, ...] = (-1,)
    ) -> tuple[Tensor, Quantized]:
        """(x, quantized x): gradients of the product that uses the codes pass straight through to x."""
        with torch.no_grad():
            return x, self.quantized(x, valid, dims)


class LsqQuantizer(nn.Module):
    """Quantizer with one learned step size (Esser et al., Learned Step Size Quantization (2020); BinaryBERT's A4).

    Codes are round((x - low) / step), clamped to k unsigned bits; without `low`, round(x / step) clamped to k signed
    bits. `step` is 0 until `calibrate` has seen a batch, then positive, and saved as it is used. One bit is elastic
    binarization (BiT, Liu et al. 2022, eq. 4-6): {0, 1} above `low`, otherwise {-1, +1}, the sign of x minus a learned
    `shift` for each channel.

    Args:
        bits: 1 to 8.
        low: least value of x, where there is one: 0 after ReLU and softmax. A constant instead of the batch's minimum,
            which the papers take: a prediction must not depend on its batch.
        features: numbers that one longest input sentence has here; scales the gradient of the step size (LSQ eq. 5).
        channels: size of x's last dim, for the shift.
    """

    def __init__(self, bits: int, low: float | None, features: int, channels: int = 1):
        super().__init__()
        self.low, self.signs = low, bits == 1 and low is None
        self.least, self.most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if low is None else (0, 2**bits - 1)
        if self.signs:
            self.least, self.most = -1, 1
            self.shift = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.gradient_scale = 1 / math.sqrt(features * self.most)
        self.step = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.calibrating, self.ready = False, False

    @torch.no_grad()
    def calibrate(self, x: Tensor, valid: Tensor | None) -> None:
        """First step size: 2 mean|x| / sqrt(largest code) (LSQ section 2.1), twice that above `low` (BinaryBERT)."""
        magnitude = (x if self.low is None else x - self.low).abs()
        mean = magnitude.mean() if valid is None else (magnitude * valid).sum() / valid.expand_as(x).sum().clamp_min(1)
        factor = 2 if self.low is None else 4
        self.step.copy_((factor * mean / math.sqrt(self.most)).clamp_min(MIN_STEP))

    @torch.no_grad()
    def quantized(self, x: Tensor, valid: Tensor | None = None) -> Quantized:
        """Float whole codes, from 0 where there is `low`; the positions that `valid` marks calibrate."""
        x = x.float()
        if self.signs:
            x = x - self.shift
        step = self.step.detach().clamp_min(MIN_STEP)
        if not self.ready and torch.compiler.is_compiling():  # a graph cannot raise
            step = torch.where(self.step == 0, torch.nan, step)
        elif not self.ready:
            self._prepare(x, valid)
            step = self.step.detach().clamp_min(MIN_STEP)
        if self.signs:
            codes = torch.where(x >= 0, 1.0, -1.0)
        else:
            shifted = x if self.low is None else x - self.low
            codes = (shifted / step).round_().clamp_(self.least, self.most)
        shape = (1,) * x.dim()
        offset = None if not self.low else torch.full(shape, self.low, dtype=x.dtype, device=x.device)
        return Quantized(codes, step.view(shape), offset)

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of x (LSQ eq. 3: its own inside the range), the step size (eq. 5) and, where there is one, the
        shift (C,), given that of the quantized x (..., C)."""
        if self.signs:
            x = x - self.shift.detach()
        elif self.low is not None:
            x = x - self.low
        level = x / self.step.detach().clamp_min(MIN_STEP)
        inside = (level >= self.least) & (level <= self.most)
        if self.signs:  # step * sign(x)
            slope = torch.where(x >= 0, 1.0, -1.0)
        else:
            slope = level.round().clamp_(self.least, self.most) - level * inside
        of_x = grad * inside
        of_shift = -of_x.float().flatten(0, -2).sum(0) if self.signs else None
        return of_x, (grad.float() * slope).sum() * self.gradient_scale, of_shift

    def _prepare(self, x: Tensor, valid: Tensor | None) -> None:
        if self.calibrating and not bool(self.step > 0):
            self.calibrate(x, valid)
        if not bool(self.step != 0):
            raise ValueError("activation step sizes have no value yet: call model.calibrate(**batch) before training")
        self.ready = True

    def reset(self) -> None:
        """Forget the step size and the shift."""
        self.step.data.zero_()
        if self.signs:
            self.shift.data.zero_()
        self.ready = False

    def _apply(self, fn, recurse=True):
        self.ready = False
        return _apply_keeping_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        return f"codes {self.least}..{self.most}, low={self.low}"


class PactQuantizer(nn.Module):
    """Dynamic min-max range between two learned clips (Choi et al., PACT (2018); BinaryBERT's A8).

    `clip` holds (low, high). A value beyond a clip gives its gradient to that clip.
    """

    def __init__(self, dynamic: ActivationQuantizer):
        super().__init__()
        self.dynamic = dynamic
        self.clip = nn.Parameter(torch.tensor([-PACT_CLIP, PACT_CLIP], dtype=torch.float32))

    def quantize(
        self, x: Tensor, valid: Tensor | None = None, dims: tuple[int, ...] = (-1,)
    ) -> tuple[Tensor, Quantized]:
        """(clipped x, quantized clipped x)."""
        low, high = self.clip.unbind()
        clipped = torch.minimum(torch.maximum(x.float(), low), high)
        return self.dynamic.quantize(clipped, valid, dims)

    def reset(self) -> None:
        """Back to the first clips."""
        self.clip.data.copy_(torch.tensor([-PACT_CLIP, PACT_CLIP]))

    def _apply(self, fn, recurse=True):
        return _apply_keeping_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        return str(self.dynamic)


InputQuantizer = ActivationQuantizer | LsqQuantizer | PactQuantizer  # any of activations


def _apply_keeping_float32(module: nn.Module, fn, recurse: bool) -> nn.Module:
    """`nn.Module._apply` that moves a quantizer but never rounds its state: a cast to bf16 would change codes."""
    before = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
    nn.Module._apply(module, fn, recurse)
    for name, data in before.items():
        after = getattr(module, name)
        if after.dtype != torch.float32:
            after.data = data.to(after.device)
    return module


def _masked_range(
    x: Tensor, valid: Tensor | None, dims: tuple[int, ...], symmetric: bool
) -> tuple[Tensor | None, Tensor]:
    """(minimum, maximum) over dims, or (None, largest magnitude); 0 where nothing is valid."""
    if symmetric:
        magnitude = x.abs()
        return None, (magnitude if valid is None else magnitude * valid).amax(dims, keepdim=True)
    if valid is None:
        return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    low = x.masked_fill(~valid, torch.inf).amin(dims, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(dims, keepdim=True)
    empty = torch.isinf(low)
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def softmax_codes(scores: Tensor, bits: int, per_tensor: bool, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last dim whose result also comes as unsigned codes: (probabilities, codes, scale).

    With e = exp(score - row maximum) the largest probability of a row has e = 1, so the per-token codes are
    round(levels * e) and the scale 1 / (levels * sum e): masked scores get code 0, and neither padding nor the order
    of a sum can move a code. Probabilities are never negative, so their lower bound is 0 in both min-max settings.
    The exponential is taken in float64 and rounded once, because no two CPUs round a float32 one alike.
    """
    levels = 2**bits - 1
    e = (scores - scores.amax(-1, keepdim=True)).double().exp_().to(scores.dtype)
    total = e.sum(-1, keepdim=True, dtype=torch.float64).to(e.dtype)
    probabilities = e / total
    if per_tensor:
        rows = probabilities if valid is None else probabilities * valid
        largest = rows.amax().view(1, 1, 1, 1).clamp_min(TINY)
        return probabilities, torch.round(probabilities * (levels / largest)).clamp_max(levels), largest / levels
    return probabilities, (e * levels).round_(), 1 / (levels * total)
