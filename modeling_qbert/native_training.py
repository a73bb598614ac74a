"""What training takes from the native engine beyond `native`: dropout, softmax, what surrounds the products of linear
layers, and ghost features, each in one pass.

Shapes as in `native`.
"""

from ctypes import c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .native import GhostWeights, Place, address_of, check, floats, library
from .quantizers import Quantized


MOST_TAPS = 15  # tokens of a ghost feature's kernel whose gradient the engine has


class Dropout(NamedTuple):
    """Dropout of a share p < 1 of numbers; which ones follows from a seed below 2^64, not from threads or CPU."""

    seed: int
    p: float

    def parts(self) -> tuple[int, int, float]:
        return self.seed, round(self.p * 2**32), 1 / (1 - self.p)


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """x (..., I) float32 with 0 for what is dropped, the rest divided by 1 - p; its own gradient as well."""
    y = torch.empty_like(x)
    sizes = (x.numel() // x.shape[-1], x.shape[-1], *dropout.parts())
    library.qb_dropout(address_of(x, torch.float32), *sizes, y.data_ptr(), torch.get_num_threads())
    return y


Factors = tuple[Tensor, Tensor | None, Tensor | None]


def scale_products(y: Tensor, of_rows: Factors, of_columns: Factors, terms: int, factor: float) -> Tensor:
    """What `ops._product` does to products of codes over `terms` columns, in place of float32 y (..., N, M).

    Scale, offset and sums of codes of the rows (..., N, 1); scale, offset and sums of codes times scale of the columns
    (..., 1, M); all broadcastable. The sums are None where the other side has no offset.
    """
    lead, (rows, columns) = y.shape[:-2], y.shape[-2:]
    of_rows = [None if x is None else x.expand(*lead, rows, 1).contiguous() for x in of_rows]
    of_columns = [None if x is None else x.expand(*lead, 1, columns).contiguous() for x in of_columns]
    library.qb_scale(
        address_of(y, torch.float32),
        lead.numel(),
        rows,
        columns,
        (c_void_p * 3)(*(address_of(part, torch.float32) for part in of_rows)),
        (c_void_p * 3)(*(address_of(part, torch.float32) for part in of_columns)),
        terms,
        factor,
        torch.get_num_threads(),
    )
    return y


def _line(length: int, *numbers: Tensor | None) -> list[Tensor | None]:
    """Contiguous float32 (length,) of tensors with as many numbers or one."""
    return [None if x is None else x.detach().float().flatten().expand(length).contiguous() for x in numbers]


def finish_products(products: Tensor, x: Quantized, scale: Tensor, sums: Tensor | None, bias: Tensor | None) -> Tensor:
    """What `ops.add_products` does to the exact products int32 (N, O) of one plane and scale group: float32 (N, O).

    x's scale and offset are (N, 1) or (1, 1), the weight's scale (1, O) or (1, 1); sums (1, O), which an offset needs;
    bias (O,).
    """
    (rows, columns), y = products.shape, floats(*products.shape)
    of_rows = _line(rows, x.scale, x.offset)
    of_columns = _line(columns, scale, None if x.offset is None else sums, bias)
    library.qb_finish(
        address_of(products, torch.int32),
        rows,
        columns,
        *(address_of(line, torch.float32) for line in (*of_rows, *of_columns)),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def linear_gradient(gradient: Tensor, x: Quantized, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a linear layer's gradient float32 (N, O): in bfloat16 times the weight's scale, and times x's; then the sums
    over rows (O,) of itself and of itself times x's offset, 0 where there is none. Scales and offset as in
    `finish_products`."""
    rows, columns = gradient.shape
    products = [torch.empty(gradient.shape, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    sums = [floats(columns) for _ in range(2)]
    lines = [*_line(rows, x.scale, x.offset), *_line(columns, scale)]
    status = library.qb_linear_gradient(
        address_of(gradient, torch.float32),
        rows,
        columns,
        *(address_of(line, torch.float32) for line in lines),
        *(part.data_ptr() for part in (*products, *sums)),
        torch.get_num_threads(),
    )
    check(status)
    return *products, *sums


def step_gradient(gradient: Tensor, x: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """`LsqQuantizer.gradients` of float32 x (..., C), before the step size's own scale; the last is of signs only."""
    signs, columns = place.shift is not None, x.shape[-1]
    of_x, of_step, of_shift = torch.empty_like(x), floats(1), floats(columns if signs else 0)
    least, most = (-1, 1) if signs else (place.least, place.most)
    status = library.qb_step_gradient(
        address_of(gradient, torch.float32, x.shape),
        address_of(x, torch.float32),
        address_of(place.shift, torch.float32, (columns,)),
        x.numel() // columns,
        columns,
        *(place.step, place.floor, least, most),
        *(part.data_ptr() for part in (of_x, of_step, of_shift)),
        torch.get_num_threads(),
    )
    check(status)
    return of_x, of_step.squeeze(), of_shift


def softmax_codes(scores: Tensor, bits: int, dropout: Dropout) -> tuple[Tensor, Tensor, Tensor]:
    """`quantizers.softmax_codes` of float32 scores (..., I); codes and scale (..., 1) are those after dropout."""
    probabilities, codes = torch.empty_like(scores), torch.empty_like(scores)
    scale = floats(*scores.shape[:-1], 1)
    library.qb_softmax_codes(
        address_of(scores, torch.float32),
        scale.numel(),
        scores.shape[-1],
        2**bits - 1,
        *dropout.parts(),
        probabilities.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return probabilities, codes, scale


def softmax_gradient(gradient: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
    """Gradient of the scores from that of the probabilities after dropout, float32 (..., I) all three."""
    out = torch.empty_like(gradient)
    library.qb_softmax_gradient(
        address_of(gradient, torch.float32),
        address_of(probabilities, torch.float32, gradient.shape),
        gradient.numel() // gradient.shape[-1],
        gradient.shape[-1],
        *dropout.parts(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def ghost_features(y: Tensor, real: Tensor | None, ghosts: GhostWeights) -> Tensor:
    """Float32 y (B, T, C) with its ghost features; tokens where the bool `real` (B, T) is False stay as they are."""
    features, size, columns = ghosts.kernels.shape
    if real is None:
        rows, places = y.flatten(0, 1), torch.arange(y.shape[0] * y.shape[1], device="cpu")
    else:
        rows, places = y[real], real.flatten().nonzero().flatten()
    out = torch.empty_like(rows)
    inputs = [address_of(rows, torch.float32, (len(places), columns)), address_of(places, torch.int64)]
    sizes = (len(places), y.shape[1], columns, features, size)
    check(library.qb_ghosts(*inputs, *sizes, *_ghosts(ghosts), out.data_ptr(), torch.get_num_threads()))
    return out.view_as(y) if real is None else y.masked_scatter(real.unsqueeze(-1), out)


def ghost_gradient(
    gradient: Tensor, y: Tensor, real: Tensor | None, ghosts: GhostWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, kernels and factors from that of `ghost_features` (B, T, C), float32 all; kernels of at most
    `MOST_TAPS` tokens."""
    features, size, columns = ghosts.kernels.shape
    if size > MOST_TAPS:
        raise ValueError(f"kernels: expected at most {MOST_TAPS} tokens, found {size}")
    shape = (*y.shape[:2], columns)
    inputs = [address_of(part, torch.float32, shape) for part in (gradient, y)]
    found = gradient.clone(), torch.zeros_like(ghosts.kernels), torch.zeros_like(ghosts.scale)
    library.qb_ghost_gradient(
        *inputs,
        address_of(real, torch.bool, shape[:2]),
        *(*shape, features, size),
        *_ghosts(ghosts),
        *(part.data_ptr() for part in found),
        torch.get_num_threads(),
    )
    return found


def _ghosts(ghosts: GhostWeights) -> list:
    features, _, columns = ghosts.kernels.shape
    return [address_of(ghosts.kernels, torch.float32), address_of(ghosts.scale, torch.float32, (features, columns))]
