"""Ternary weight splitting: a ternary weight becomes two binary ones of the same sum (BinaryBERT, ACL 2021)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from modeling_qbert import quantize_bwn, quantize_twn


CORRECTIONS = 8  # at most; one is rarely needed


def split_ternary(
    weight: Tensor, granularity: Literal["per_tensor", "per_row"] = "per_tensor"
) -> tuple[Tensor, Tensor]:
    """Two latent weights whose binary codes and scales sum to the ternary ones of `weight`.

    With I the weights that TWN keeps, J the positive ones that it zeroes, K the others, n = |I| + |J| + |K|:

        w1 = a w on I,       w + b on J,    b on K
        w2 = (1 - a) w on I,    -b on J,    w - b on K
        a = (sum_I |w| - sum_J |w| + sum_K |w|) / (2 sum_I |w|)
        b = (n alpha - sum |w|) / (2 (|J| + |K|))

    so that w1 + w2 = w, and both have the mean magnitude alpha / 2, alpha being TWN's scale: with BWN's codes,
    alpha / 2 (sign w1 + sign w2) is the ternary weight, to the bit, and so is every product with it (of a matrix of a
    few hundred weights a scale may stay one float off). (BinaryBERT section 3.2. The sign of J and K in `a` follows
    from equal means; printed with the signs exchanged the means differ by 1.6 % on Gaussian weights.)

    Args:
        weight: latent weight (O, I).
        granularity: what shares one scale, a and b: the matrix or each row.

    Returns:
        (w1, w2), each (O, I) of the type of `weight`; computed in float64. A group of zeros splits into the smallest
        scale and its negative, which add up to zeros.

    Raises:
        ValueError: `weight` is no finite matrix, or has a granularity that splitting does not know.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight must be a finite float matrix (O, I), found {weight.dtype} {list(weight.shape)}")
    if granularity not in ("per_tensor", "per_row"):
        raise ValueError(f"granularity must be 'per_tensor' or 'per_row', found {granularity!r}")
    codes, alpha, _ = quantize_twn(weight, granularity)
    w, alpha = weight.double(), alpha.double()
    magnitude = w.abs()

    def total(values: Tensor) -> Tensor:
        return values.sum(1, keepdim=True) if granularity == "per_row" else values.sum().view(1, 1)

    kept = codes != 0
    up, down = ~kept & (w > 0), ~kept & (w <= 0)
    kept_sum, kept_count = total(magnitude * kept), total(kept.double())
    count = total(torch.ones_like(w))
    a = (kept_sum - total(magnitude * up) + total(magnitude * down)) / (2 * kept_sum)
    b = (count * alpha - total(magnitude)) / (2 * (count - kept_count).clamp_min(1))
    empty = kept_count == 0  # TWN keeps nothing of a group of zeros
    a, b = a.masked_fill(empty, 0.5), torch.where(empty, alpha, b)
    for _ in range(CORRECTIONS):
        first = torch.where(kept, a * w, torch.where(up, w + b, b)).to(weight.dtype)
        second = torch.where(kept, (1 - a) * w, torch.where(down, w - b, -b)).to(weight.dtype)
        errors = [quantize_bwn(plane, granularity).scale.double() - alpha / 2 for plane in (first, second)]
        if not any(bool(error.any()) for error in errors):
            break
        # What rounding moved a mean by is taken back by halves: a scale that is one float off is off by less than two.
        a = a - (errors[0] - errors[1]) * count / (4 * kept_sum.clamp_min(alpha))
        b = b - (errors[0] + errors[1]) * count / (4 * (count - kept_count).clamp_min(1))
    return first, second


def split_state_dict(state: Mapping[str, Tensor], planes: Mapping[str, str], biases: set[str]) -> dict[str, Tensor]:
    """State dict of a split model from that of its ternary original.

    Args:
        state: name -> tensor of the ternary latent model.
        planes: name -> granularity of the weights to split.
        biases: names of the biases beside them, which are halved.

    Everything else, step sizes and clips included, is copied: both planes read the same activation codes.

    Raises:
        ValueError: a name is not in `state`.
    """
    missing = sorted((set(planes) | biases) - set(state))
    if missing:
        raise ValueError(f"the ternary model has no tensors {missing[:5]} to split")
    result = {}
    for name, tensor in state.items():
        if name in planes:
            result[name] = torch.stack(split_ternary(tensor, planes[name]))
        elif name in biases:
            result[name] = torch.stack((tensor / 2, tensor / 2))
        else:
            result[name] = tensor.clone()
    return result
