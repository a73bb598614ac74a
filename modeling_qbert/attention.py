"""Attention with quantized Q, K, probabilities and V, for every backbone, through Transformers' attention interface.

`integration` registers it under two names: `qbert` returns attention probabilities, `qbert_scores` the pre-softmax
scores, which distillation compares (TernaryBERT section 3.2). Both quantize when the module's config says so and are
plain eager attention otherwise, so a full-precision teacher gives its scores through the same function.

Shapes: B batch, H heads, T tokens, D head dim.
"""

import torch
from torch import Tensor, nn

from .ops import SoftmaxCodes, learned_softmax_codes, quantize, quantized_matmul
from .ops import dropout as fast_dropout
from .quantizers import LsqQuantizer, Quantized, softmax_codes


MASKED = -1e3  # an additive mask below this hides a key: masks hold 0 and -10,000 or the least number of their type


def _transposed(x: Quantized) -> Quantized:
    return Quantized(*(None if part is None else part.transpose(-1, -2) for part in x))


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    return_scores: bool = False,
    **kwargs,  # noqa: ARG001 (Transformers passes more than one attention needs)
) -> tuple[Tensor, Tensor]:
    """Attention of query, key, value (B, H, T, D) with a mask (B, 1, T or 1, T): additive, or boolean, False hides.

    Q and K have one range per token and head, probabilities one per query. V has one per sentence and head, over the
    tokens that its mask keeps: a range per token would put its scale inside the sum over tokens, and the product would
    no longer be one of whole numbers. No range sees padding or a neighbouring sentence. With
    `activation_granularity="per_tensor"` each of the four has one range over the batch, padding excluded. Learned
    quantizers are the module's own `query_quantizer`, `key_quantizer`, `value_quantizer`, `probability_quantizer`.

    Returns the context (B, T, H, D) and the probabilities before dropout, or scores if `return_scores`, (B, H, T, T).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    quantizer = getattr(module.config, "activation_quantizer_spec", None)
    learned = getattr(module, "probability_quantizer", None)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, least)
    if quantizer is None and learned is None:
        scores = (query @ key.transpose(-1, -2)) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        probabilities = nn.functional.softmax(scores, dim=-1)
        if module.training:
            probabilities = fast_dropout(probabilities, dropout)
        context = probabilities @ value
    else:
        token_is_real = None  # (B, 1, T, 1): tokens that some query may attend to
        if attention_mask is not None:
            attention_mask = attention_mask.float().clamp_min(torch.finfo(torch.float32).min)
            token_is_real = (attention_mask > MASKED).any(-2).unsqueeze(-1)
            token_is_real = token_is_real.any(1, keepdim=True)
        per_tensor = quantizer is not None and quantizer.per_tensor
        rows_are_real = token_is_real if per_tensor or learned is not None else None
        dtype = query.dtype
        query, key, value = query.float(), key.float(), value.float()
        if hasattr(module, "query_quantizer"):
            query, query_codes = quantize(query, module.query_quantizer, rows_are_real)
            key, key_codes = quantize(key, module.key_quantizer, rows_are_real)
            value, value_codes = quantize(value, module.value_quantizer, token_is_real, dims=(-2, -1))
        else:
            if per_tensor:
                query_codes, key_codes = (quantizer.quantized(x, rows_are_real) for x in (query, key))
            else:  # their ranges lie within a token: one call for both
                both = quantizer.quantized(torch.stack((query, key)))
                query_codes, key_codes = (
                    Quantized(*(None if x is None else x[index] for x in both)) for index in range(2)
                )
            value_codes = quantizer.quantized(value, token_is_real, dims=(-2, -1))
        scores = quantized_matmul(query, key.transpose(-1, -2), query_codes, _transposed(key_codes), scaling)
        if attention_mask is not None:
            scores = scores + attention_mask
        p = dropout if module.training else 0.0
        if isinstance(learned, LsqQuantizer):
            probabilities, carrier, codes, scale = learned_softmax_codes(scores, learned, rows_are_real, p)
        elif torch.is_grad_enabled() or p:
            of_softmax = (quantizer.bits, per_tensor, rows_are_real, p)
            probabilities, carrier, codes, scale = SoftmaxCodes.apply(scores, *of_softmax)
        else:
            probabilities, codes, scale = softmax_codes(scores, quantizer.bits, per_tensor, rows_are_real)
            carrier = probabilities
        context = quantized_matmul(carrier, value, Quantized(codes, scale), value_codes).to(dtype)
    return context.transpose(1, 2).contiguous(), scores if return_scores else probabilities
