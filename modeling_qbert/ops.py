"""Products and look-ups of quantized tensors in plain torch; the only door to faster kernels.

A product of codes is accumulated exactly, so fake-quant and packed layers, every batch and every device give the same
whole numbers; one fixed float formula then applies the scales. The float steps between products (`layer_norm`,
`gelu`, softmax in `quantizers`) are sequences of single roundings as well, so that the native engine, another CPU or
another batch cannot move a code.

Shapes: N tokens (any leading dims flattened), O out rows, I in columns, G groups, P planes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .quantizers import InputQuantizer, LsqQuantizer, PactQuantizer, Quantized, expand_scale, softmax_codes


try:
    from .native import (
        EmbeddingTables,
        GhostWeights,
        LayerWeights,
        NativeDense,
        NativeEncoder,
        NativeWeight,
        place_of,
        same_bytes,
        supports,
    )
    from .native import quantize as native_quantize
    from .native_ops import traced_linear
    from .native_training import (
        MOST_TAPS,
        Dropout,
        drop,
        finish_products,
        ghost_features,
        ghost_gradient,
        linear_gradient,
        scale_products,
        softmax_gradient,
        step_gradient,
    )
    from .native_training import softmax_codes as native_softmax_codes

    WHY_NOT_NATIVE = ""
except ImportError as _error:  # built without a compiler, or copied as remote code
    EmbeddingTables = GhostWeights = LayerWeights = NativeDense = NativeEncoder = NativeWeight = None
    place_of = same_bytes = supports = traced_linear = ghost_features = ghost_gradient = None
    MOST_TAPS = 0
    Dropout = drop = native_softmax_codes = scale_products = softmax_gradient = None
    finish_products = linear_gradient = step_gradient = native_quantize = None
    WHY_NOT_NATIVE = str(_error)

EXACT_FLOAT32 = 2**24  # whole numbers up to here are exact in float32


_CPU_HAS_VNNI = torch.cpu._is_vnni_supported()  # asked once: a call in forward would break torch.compile's graph


def has_fast_int8(device: torch.device) -> bool:
    """Whether torch multiplies int8 matrices fast on this device (CPU with VNNI, or CUDA)."""
    return device.type == "cuda" or (device.type == "cpu" and _CPU_HAS_VNNI)


def whole_products(x: Tensor, weight: Tensor) -> Tensor | None:
    """x (N, I) @ weight (O, I)^T of int8 codes -> int32 (N, O); None where torch has no fast product for it."""
    if has_fast_int8(x.device) and x.shape[1] > 1:  # of one column, torch 2.13's CPU product reads foreign memory
        rows, (out, columns) = x.shape[0], weight.shape
        if x.device.type == "cpu" or (rows > 16 and out % 8 == 0 and columns % 8 == 0):  # cuBLAS' limits
            return torch._int_mm(x, weight.t())
    return None


def matmul_codes(x: Tensor, weight: Tensor, bound: int) -> Tensor:
    """x (N, I) @ weight (O, I)^T of int8 codes -> exact sums, rounded once to float32 (N, O).

    `bound` is the largest magnitude in `weight`: it tells which float type still adds exactly.
    """
    whole = whole_products(x, weight)
    if whole is not None:
        return whole.float()
    exact = 128 * bound * x.shape[1] <= EXACT_FLOAT32
    dtype = torch.float32 if exact else torch.float64
    return (x.to(dtype) @ weight.to(dtype).t()).float()


def flatten_planes(weight: Quantized) -> Quantized:
    """A weight of codes (P, O, I) as one of P * O rows, whose planes share one product; one of (O, I) as it is."""
    if weight.codes.dim() == 2:
        return weight
    planes, rows, _ = weight.codes.shape
    scale = weight.scale.expand(planes, rows, weight.scale.shape[2])
    return Quantized(weight.codes.flatten(0, 1), scale.flatten(0, 1))


def linear_codes(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    bound: int,
    group_size: int,
    sums: Tensor | None = None,
    planes: int = 1,
) -> Tensor:
    """Linear layer of an activation (N, I) and a weight (P * O, I), both int8 codes -> float32 (N, O).

    y = bias + the sum over scale groups of x offset * `scaled_code_sums` + code products * x scale * weight scale.
    `sums` are the weight's `scaled_code_sums`, if they are known already.
    """
    if x.offset is not None and sums is None:
        sums = scaled_code_sums(weight, bound, group_size, planes)
    groups = weight.scale.shape[1]
    if planes == groups == 1 and _is_native(x.scale, weight.scale):
        products = whole_products(x.codes, weight.codes)
        if products is not None:
            return finish_products(products, x, weight.scale, sums, bias)
    y = None if bias is None else bias.float()
    for group, scale in enumerate(weight.scale.unbind(1)):
        columns = slice(group * group_size, (group + 1) * group_size)
        codes = (x.codes, weight.codes)
        if groups > 1:
            codes = [part[:, columns].contiguous() for part in codes]
        products = matmul_codes(*codes, bound).chunk(planes, 1)
        part = None if sums is None else sums[group : group + 1]
        y = add_products(y, products, x, scale.view(1, -1).chunk(planes, 1), part)
    return y


def add_products(
    y: Tensor | None, products: Sequence[Tensor], x: Quantized, scales: Sequence[Tensor], sums: Tensor | None
) -> Tensor:
    """(x offset * sums + y) + products * (x scale * weight scale): for each plane a product (N, O) and a scale (1, O)
    or (1, 1); sums (1, O) of all planes.

    Operation by operation: `addcmul` rounds once or twice, as the CPU and the place in memory have it.
    """
    if x.offset is not None:
        y = x.offset * sums if y is None else x.offset * sums + y
    products = _sum_of_planes(products, scales, x.scale)
    return products if y is None else products.add_(y)


def _sum_of_planes(values: Sequence[Tensor], scales: Sequence[Tensor], factor: Tensor | float = 1.0) -> Tensor:
    """The sum over planes of value * (factor * scale).

    Two planes as (a + b) * half the sum of their scales + (a - b) * half the difference: where both scales are equal,
    as splitting makes them, that is the ternary weight's product to the bit.
    """
    if len(values) == 1:
        return values[0] * (factor * scales[0])
    (first, second), (scale, other) = values, scales
    half_sum, half_difference = (scale + other) * 0.5, (scale - other) * 0.5
    return (first + second) * (factor * half_sum) + (first - second) * (factor * half_difference)


def scaled_code_sums(weight: Quantized, bound: int, group_size: int, planes: int = 1) -> Tensor:
    """Sum of the int8 codes (P * O, I) over the columns of each scale group, times its scale: float32 (G, O)."""
    parts = [weight.codes] if weight.scale.shape[1] == 1 else weight.codes.split(group_size, 1)
    sums = [matmul_codes(part.new_ones(1, part.shape[1]), part.contiguous(), bound) for part in parts]
    return _sum_of_planes(torch.cat(sums).chunk(planes, 1), weight.scale.t().chunk(planes, 1))


def dequantize_weight(weight: Quantized, group_size: int) -> Tensor:
    """scale * codes of a weight (O, I) or (P, O, I), float32; planes stay apart."""
    if weight.codes.dim() == 3:
        planes = [dequantize_weight(Quantized(*plane), group_size) for plane in zip(weight.codes, weight.scale)]
        return torch.stack(planes)
    return weight.codes.to(weight.scale.dtype) * expand_scale(weight.scale, weight.codes.shape[1], group_size)


class _LinearCodes(torch.autograd.Function):
    """`linear_codes` with straight-through gradients to the latent activation and weight."""

    @staticmethod
    def forward(ctx, x, latent_weight, bias, x_codes, x_scale, x_offset, codes, scale, bound, group_size, planes):  # noqa: ARG004
        activation, weight = Quantized(x_codes, x_scale, x_offset), Quantized(codes, scale)
        ctx.save_for_backward(x_codes, x_scale, x_offset, codes, scale)
        ctx.group_size, ctx.x_dtype, ctx.planes = group_size, x.dtype, planes
        device = x_codes.device.type
        ctx.backward_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            return linear_codes(activation, weight, bias, bound, group_size, planes=planes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_codes, x_scale, x_offset, codes, scale = ctx.saved_tensors
        dtype = ctx.backward_dtype
        grad = grad.float()
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if dtype == torch.bfloat16 and scale.shape[1] == ctx.planes == 1 and _is_native(grad, x_scale, scale):
                of_input, of_weight, grad_bias, offsets = linear_gradient(
                    grad.contiguous(), Quantized(x_codes, x_scale, x_offset), scale
                )
                grad_x = (of_input @ codes.to(dtype)).to(ctx.x_dtype)
                grad_weight = (of_weight.t() @ x_codes.to(dtype)).float().add_(offsets.view(-1, 1))
                found = zip((grad_x, grad_weight, grad_bias), ctx.needs_input_grad)
                return *(gradient if needed else None for gradient, needed in found), *(None,) * 8
            if ctx.needs_input_grad[0]:
                # One scale a row is folded into the smaller factor: codes are exact in any float type.
                if scale.shape[1] == 1 and ctx.planes == 1:
                    grad_x = ((grad * scale.view(1, -1)).to(dtype) @ codes.to(dtype)).to(ctx.x_dtype)
                else:
                    weight = dequantize_weight(Quantized(codes, scale), ctx.group_size)
                    weight = weight.view(ctx.planes, -1, weight.shape[1]).sum(0)
                    grad_x = (grad.to(dtype) @ weight.to(dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = ((grad * x_scale).to(dtype).t() @ x_codes.to(dtype)).float()
                if x_offset is not None:
                    grad_weight += (grad * x_offset).sum(0).view(-1, 1)
                if ctx.planes > 1:  # the same for every plane
                    grad_weight = grad_weight.expand(ctx.planes, -1, -1)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, *(None,) * 8


def quantized_linear(
    x: Tensor,
    latent_weight: Tensor | None,
    bias: Tensor | None,
    activation: Quantized,
    weight: Quantized,
    bound: int,
    group_size: int,
    sums: Tensor | None = None,
    planes: int = 1,
) -> Tensor:
    """`linear_codes` of x (N, I) and a weight (P * O, I), differentiable in x, bias and the latent weight, which is
    (O, I), (P, O, I) or, when packed, None.

    Under autocast the forward stays exact; the two products of the backward run in the autocast type.
    """
    if not torch.is_grad_enabled():
        return linear_codes(activation, weight, bias, bound, group_size, sums, planes)
    return _LinearCodes.apply(x, latent_weight, bias, *activation, *weight[:2], bound, group_size, planes)


def _is_native(*tensors: Tensor) -> bool:
    """Whether the engine takes a training step's tensors: eager float32 on the CPU."""
    if drop is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors
    )


class LearnedStep(torch.autograd.Function):
    """Identity whose backward is `LsqQuantizer.gradients`."""

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, shift: Tensor | None, quantizer: LsqQuantizer) -> Tensor:
        ctx.save_for_backward(x, step, shift)  # for the check that none was written to meanwhile
        ctx.quantizer = quantizer
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (x, step, shift), quantizer = ctx.saved_tensors, ctx.quantizer
        if x.numel() and _is_native(grad, x, step):
            found = step_gradient(grad.contiguous(), x.contiguous(), place_of(quantizer))
            return found[0], found[1] * quantizer.gradient_scale, None if shift is None else found[2], None
        return *quantizer.gradients(grad, x), None


def straight_through(x: Tensor, quantizer: LsqQuantizer) -> Tensor:
    """float32 x for the backward pass: gradients of what uses the codes come to x and to the quantizer through it."""
    x = x.float()
    if not torch.is_grad_enabled():
        return x
    return LearnedStep.apply(x, quantizer.step, quantizer.shift if quantizer.signs else None, quantizer)


def quantize(
    x: Tensor, quantizer: InputQuantizer, valid: Tensor | None = None, dims: tuple[int, ...] = (-1,)
) -> tuple[Tensor, Quantized]:
    """(x for the backward pass, quantized x): float whole codes by any quantizer of activations."""
    if isinstance(quantizer, LsqQuantizer):
        return straight_through(x, quantizer), quantizer.quantized(x, valid)
    return quantizer.quantize(x, valid, dims)


def quantize_rows(x: Tensor, quantizer: InputQuantizer, valid: Tensor | None) -> tuple[Tensor, Quantized] | None:
    """As `quantize`, int8 codes (N, I) of x (..., I); None where the engine has no part. valid: (..., 1)."""
    learned = isinstance(quantizer, LsqQuantizer)
    fit = quantizer.ready if learned else not isinstance(quantizer, PactQuantizer) and not quantizer.per_tensor
    if not fit or not x.numel() or not _is_native(x):
        return None
    place = place_of(quantizer)
    real = None if valid is None or learned else valid.expand(*x.shape[:-1], 1).flatten()
    codes, scale, offset = native_quantize(x.detach().contiguous().view(-1, x.shape[-1]), place, real)
    if learned:
        offset = offset[:1] if place.less or place.floor else None
        return straight_through(x, quantizer), Quantized(codes, scale[:1], offset)
    return x, Quantized(codes, scale, None if quantizer.symmetric else offset)


def _product(a: Quantized, b: Quantized, factor: float, training: bool = False) -> Tensor:
    """a (..., N, K) @ b (..., K, M) of float codes, scales and offsets broadcastable outside K: exact sums, then

    (sums * (a scale * b scale) + a's sums of codes * a scale * b offset + a offset * b's sums of codes * b scale
    + K * a offset * b offset) * factor.
    """
    y, terms = a.codes @ b.codes, a.codes.shape[-1]
    a_sum = None if b.offset is None else a.codes.sum(-1, keepdim=True)
    b_sum = None if a.offset is None else b.codes.sum(-2, keepdim=True) * b.scale
    if training and _is_native(y, a.scale, b.scale):
        return scale_products(y, (a.scale, a.offset, a_sum), (b.scale, b.offset, b_sum), terms, factor)
    y.mul_(a.scale * b.scale)
    if b.offset is not None:
        y.add_((a_sum * a.scale) * b.offset)
    if a.offset is not None:
        y.add_(a.offset * b_sum)
        if b.offset is not None:
            y.add_(terms * a.offset * b.offset)
    return y if factor == 1 else y.mul_(factor)


class _MatmulCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _a, _b, a_codes, a_scale, a_offset, b_codes, b_scale, b_offset, factor):
        ctx.save_for_backward(a_codes, a_scale, a_offset, b_codes, b_scale, b_offset)
        device, ctx.factor = a_codes.device.type, factor
        ctx.backward_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            a, b = Quantized(a_codes, a_scale, a_offset), Quantized(b_codes, b_scale, b_offset)
            return _product(a, b, factor, training=True)

    @staticmethod
    def backward(ctx, grad):
        a_codes, a_scale, a_offset, b_codes, b_scale, b_offset = ctx.saved_tensors
        dtype = ctx.backward_dtype
        grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                b = Quantized(b_codes, b_scale, b_offset).dequantize() * ctx.factor
                grad_a = (grad.to(dtype) @ b.to(dtype).transpose(-1, -2)).float()
            if ctx.needs_input_grad[1]:
                if a_offset is None:  # codes are exact in any float type; the scale of a row is folded into the other
                    a, other = a_codes, grad * (a_scale * ctx.factor)
                else:
                    a, other = Quantized(a_codes, a_scale, a_offset).dequantize() * ctx.factor, grad
                grad_b = (a.to(dtype).transpose(-1, -2) @ other.to(dtype)).float()
        return grad_a, grad_b, *(None,) * 7


def quantized_matmul(
    a: Tensor, b: Tensor, a_quantized: Quantized, b_quantized: Quantized, factor: float = 1.0
) -> Tensor:
    """Batched product of the codes of a (..., N, K) and b (..., K, M) times a factor, differentiable in a and b
    (straight through), whose own values do not matter.

    Codes are float whole numbers; sums are exact while K * largest code product <= 2^24: for 8-bit attention, head
    dims up to 1,040 and up to 518 tokens.
    """
    if not torch.is_grad_enabled():
        return _product(a_quantized, b_quantized, factor)
    return _MatmulCodes.apply(a, b, *a_quantized, *b_quantized, factor)


class SoftmaxCodes(torch.autograd.Function):
    """`softmax_codes` of scores, then dropout of a share p of the codes, differentiable once.

    Gives the probabilities before dropout; zeros that stand for those after it in `quantized_matmul` and carry their
    gradient; the codes after it and their scale.
    """

    @staticmethod
    def forward(
        ctx, scores: Tensor, bits: int, per_tensor: bool, valid: Tensor | None, p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept = ctx.dropped = None
        if p < 1 and not per_tensor and _is_native(scores):
            ctx.dropped = Dropout(_seed() if p else 0, p)
            probabilities, codes, scale = native_softmax_codes(scores.contiguous(), bits, ctx.dropped)
        else:
            probabilities, codes, scale = softmax_codes(scores, bits, per_tensor, valid)
            if p:
                kept = F.dropout(torch.ones_like(codes), p)
                codes, scale = codes * kept.sign(), scale / (1 - p) if p < 1 else scale
        ctx.save_for_backward(probabilities, kept)
        ctx.mark_non_differentiable(codes, scale)
        ctx.set_materialize_grads(False)
        return probabilities, scores.new_zeros(()).expand(scores.shape), codes, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_dropped: Tensor | None, *_: None):
        probabilities, kept = ctx.saved_tensors
        if ctx.dropped is not None and grad is None and _is_native(grad_dropped):
            return softmax_gradient(grad_dropped.contiguous(), probabilities, ctx.dropped), *(None,) * 4
        if grad_dropped is not None:
            if ctx.dropped is not None:
                grad_dropped = drop(grad_dropped.float().contiguous(), ctx.dropped)
            elif kept is not None:
                grad_dropped = grad_dropped * kept
            grad = grad_dropped if grad is None else grad + grad_dropped
        product = probabilities * grad
        return torch.addcmul(product, probabilities, product.sum(-1, keepdim=True), value=-1), *(None,) * 4


def learned_softmax_codes(
    scores: Tensor, quantizer: LsqQuantizer, valid: Tensor | None, p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `SoftmaxCodes`, with unsigned codes of a learned step."""
    if torch.is_grad_enabled():
        probabilities = SoftmaxCodes.apply(scores, 8, False, None)[0]
    else:
        probabilities = softmax_codes(scores, 8, False, None)[0]
    carrier, (codes, scale, _) = quantize(probabilities, quantizer, valid)
    if p:
        kept = dropout(torch.ones_like(codes), p)
        carrier, codes, scale = carrier * kept, codes * kept.sign(), scale / (1 - p) if p < 1 else scale
    return probabilities, carrier, codes, scale


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.dropped = Dropout(_seed(), p)
        return drop(x.contiguous(), ctx.dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return drop(grad.contiguous(), ctx.dropped), None


def _seed() -> int:
    """Of torch's generator, whose state checkpoints keep."""
    return int(torch.randint(2**63 - 1, ()))


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeros for a share p of x, the rest divided by 1 - p; torch's CPU kernel would draw number by number."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if 0 < p < 1 and x.numel() and _is_native(wide):
        return _Dropped.apply(wide, p).to(x.dtype)
    return F.dropout(x, p)


class _GhostSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, real: Tensor | None, kernels: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(y, real, kernels, scale)
        return ghost_features(y, real, GhostWeights(kernels, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, real, kernels, scale = ctx.saved_tensors
        of_y, of_kernels, of_scale = ghost_gradient(grad.contiguous(), y, real, GhostWeights(kernels, scale))
        return of_y, None, of_kernels, of_scale


def ghost_sums(y: Tensor, real: Tensor | None, kernels: Tensor, scale: Tensor) -> Tensor | None:
    """y (B, T, C) with ghost features of kernels (F, C, k), ReLU and factors (F, C), differentiable once.

    Tokens where the bool `real` (B, T) is False keep their y. None where the engine does not take them.
    """
    if not _is_native(y, kernels, scale) or kernels.shape[2] > MOST_TAPS:
        return None
    real = None if real is None else real.expand(y.shape[:2]).contiguous()
    return _GhostSums.apply(y.contiguous(), real, kernels.transpose(1, 2).contiguous(), scale.contiguous())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim; mean, variance and root are taken in float64 and rounded once."""
    dtype, x = x.dtype, x.float()
    columns = x.shape[-1]
    centered = x - (x.sum(-1, keepdim=True, dtype=torch.float64) / columns).float()
    variance = (centered.square().sum(-1, keepdim=True, dtype=torch.float64) / columns).float()
    inverse = (1 / (variance + eps).double().sqrt()).float()  # torch's float32 root is not always the nearest number
    return (centered * inverse * weight.float() + bias.float()).to(dtype)


GELU_LIMIT = 5.25
# Numerator and denominator, in t^2, of (normal distribution function of t - 1/2) / t: our weighted least-squares fit
# for |t| <= 5.25. In float32 GELU is within 1.2e-6 of its exact value for |x| <= 12.
GELU_NUMERATOR = (
    0.39894214272499084,
    0.0336160734295845,
    0.004671834409236908,
    0.00016763329040259123,
    6.462956662289798e-06,
    2.371082175045558e-08,
)
GELU_DENOMINATOR = (
    1.0,
    0.2509281039237976,
    0.0285341814160347,
    0.001877225935459137,
    7.388471567537636e-05,
    1.233577677339781e-06,
)


def gelu(x: Tensor) -> Tensor:
    """GELU by a rational function: every device and compiler rounds it alike, unlike its erf."""
    dtype, x = x.dtype, x.float()
    limited = x.clamp(-GELU_LIMIT, GELU_LIMIT)
    square = limited * limited
    numerator, denominator = (_polynomial(square, coefficients) for coefficients in (GELU_NUMERATOR, GELU_DENOMINATOR))
    return (x * (limited * numerator / denominator + 0.5)).to(dtype)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value = (value + coefficient) * x
    return value + coefficients[0]
