"""The engine's product as an operator of torch, which `torch.compile` and `torch.export` keep as one node.

`qbert::packed_linear` takes what a packed layer holds, so that a graph lifts its tensors like any others. The engine's
own layout of a weight is made at the first call, and again when one of its tensors was replaced or written to.

Shapes: N rows, O out rows, I in columns, P planes, G groups.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .native import NativeDense, NativeWeight, filled_place, parts_of_place, supports
from .quantizers import ActivationQuantizer, LsqQuantizer, PactQuantizer


_weights: dict[int, tuple[list, list[StorageWeakRef], NativeWeight]] = {}  # by the address of the packed bits


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _native_weight(
    weight: Tensor, scale: Tensor, bias: Tensor | None, columns: int, layout: str, group_size: int
) -> NativeWeight:
    parts = [part for part in (weight, scale, bias) if part is not None]
    state = [(part.data_ptr(), _version(part), part.shape) for part in parts]
    known = _weights.get(weight.data_ptr())
    if known is not None and known[0] == state and not any(storage.expired() for storage in known[1]):
        return known[2]
    for address, (_, storages, _) in list(_weights.items()):
        if any(storage.expired() for storage in storages):
            _weights.pop(address, None)
    planes, (rows, width), groups = weight.shape[0] if weight.dim() == 3 else 1, weight.shape[-2:], scale.shape[-1]
    made = NativeWeight(
        weight.contiguous().view(planes, rows, width),
        columns,
        layout,
        scale.float().reshape(planes, -1, groups).expand(planes, rows, groups).contiguous(),
        group_size,
        None if bias is None else bias.float().contiguous(),
    )
    _weights[weight.data_ptr()] = (state, [StorageWeakRef(part.untyped_storage()) for part in parts], made)
    return made


@torch.library.custom_op("qbert::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    group_size: int,
    bits: int,
    kind: int,
    floor: float,
    least: int,
    most: int,
    less: int,
    step: Tensor | None,
    clip: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """float32 (N, O) of float32 x (N, I), which becomes codes, and a packed weight uint8 (O, bytes) or (P, O, bytes).

    The rest is the weight's scale (..., G) and the parts of a `Place`, as `parts_of_place` gives them.
    """
    native = _native_weight(weight.detach(), scale.detach(), bias, x.shape[1], layout, group_size)
    place = filled_place(bits, kind, floor, least, most, less, step, clip, shift)
    return NativeDense(native, place)(x.contiguous().unsqueeze(1), torch.get_num_threads())


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-2])


def traced_linear(layer: Any, x: Tensor) -> Tensor | None:
    """A `PackedLinear`'s answer to x (..., I) as one operator; None where torch's own have to do it: on another
    device, where gradients are asked for, and what the engine does not have."""
    owner, quantizer = layer.source[0] if layer.source else layer, layer.activation
    inner = getattr(quantizer, "dynamic", quantizer)
    if not isinstance(inner, ActivationQuantizer | LsqQuantizer) or getattr(inner, "per_tensor", False):
        return None
    if x.device.type != "cpu" or not supports(owner.packing, owner.weight_scale.shape[-1], layer.spec.group_size):
        return None
    learned = list(quantizer.parameters()) if isinstance(quantizer, LsqQuantizer | PactQuantizer) else []
    tensors = [x, *learned] if layer.bias is None else [x, layer.bias, *learned]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    rows = x.reshape(-1, x.shape[-1]).float()
    weight = (owner.weight, owner.weight_scale, layer.bias, owner.packing, layer.spec.group_size)
    y = packed_linear(rows, *weight, *parts_of_place(quantizer))
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)
