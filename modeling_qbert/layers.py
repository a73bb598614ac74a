"""Layers: latent (fp32 weights, fake-quant forward) and packed (bits and scales), same answers.

Shapes: O out rows, I in columns, V vocabulary, C embedding width, G groups, P planes. With one plane a weight is
(O, I), with more (P, O, I), and its layer adds the planes.
"""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import (
    dequantize_weight,
    dropout,
    flatten_planes,
    gelu,
    has_fast_int8,
    layer_norm,
    quantize,
    quantize_rows,
    quantized_linear,
    scaled_code_sums,
    traced_linear,
)
from .packing import pack_codes, packed_columns, unpack_codes
from .quantizers import (
    WEIGHT_QUANTIZERS,
    InputQuantizer,
    Quantized,
    StraightThrough,
    lat_scale,
    scale_shape,
)


PLANE_STD = 0.02  # BERT's initializer_range: the start of planes that no checkpoint and no splitting filled


@dataclass(frozen=True)
class WeightSpec:
    """How one weight becomes codes: a row of `WEIGHT_QUANTIZERS`, the granularity of its scale, its planes, and
    whether the scale is rounded to bfloat16, in training as in the file."""

    quantizer: str
    granularity: str
    group_size: int
    planes: int = 1
    short_scale: bool = False

    @property
    def bits(self) -> int:
        return WEIGHT_QUANTIZERS[self.quantizer][0]

    @property
    def bound(self) -> int:
        """Largest magnitude of a code."""
        return 1 if self.bits <= 2 else 2 ** (self.bits - 1) - 1

    def shape(self, *shape: int) -> tuple[int, ...]:
        """Shape of a weight or scale of all planes, given that of one."""
        return shape if self.planes == 1 else (self.planes, *shape)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Type of the packed scale; what is computed with is always its value in float32."""
        return torch.bfloat16 if self.short_scale else torch.float32

    def packing(self, ternary_packing: str) -> str:
        """Layout of the packed bits, given the one chosen for ternary codes."""
        return {1: "1bit", 2: ternary_packing, 3: "3bit", 4: "4bit", 8: "int8"}[self.bits]

    def quantize(self, weight: Tensor, scale: Tensor | None) -> Quantized:
        """Codes int8 and scale of a latent weight (O, I) or (P, O, I), each plane by itself; `scale` is the state of
        the loss-aware quantizer."""
        quantizer = WEIGHT_QUANTIZERS[self.quantizer][1]
        with torch.no_grad():
            # float16 holds neither the least scale nor what large ones are divided by, bfloat16 no 8-bit codes.
            if weight.dtype in (torch.float16, torch.bfloat16):
                weight = weight.float()
            if weight.dim() == 3:
                planes = [quantizer(plane, self.granularity, self.group_size) for plane in weight]
                return Quantized(torch.stack([p.codes for p in planes]), torch.stack([p.scale for p in planes]))
            if self.quantizer == "lat":
                return quantizer(weight, scale, self.group_size)
            codes, scale, _ = quantizer(weight, self.granularity, self.group_size)
            return Quantized(codes, scale.to(self.scale_dtype).to(scale.dtype))


class _LatentMixin:
    """What QuantLinear and QuantEmbedding share: their spec and, for `lat`, the scale as a saved buffer."""

    spec: WeightSpec
    weight: Tensor
    weight_scale: Tensor | None

    def _init_spec(self, spec: WeightSpec, device) -> None:
        self.spec = spec
        if spec.planes > 1:  # a start of its own for each plane: equal planes would stay equal
            planes = torch.empty(spec.shape(*self.weight.shape), device=device, dtype=self.weight.dtype)
            with torch.no_grad():
                self.weight = nn.Parameter(planes.normal_(std=PLANE_STD))
            self.register_buffer("weight_scale", None)
            return
        shape = scale_shape(*self.weight.shape, spec.granularity, spec.group_size)
        self.register_buffer("weight_scale", torch.zeros(shape, device=device) if spec.quantizer == "lat" else None)

    def quantize_weight(self) -> Quantized:
        """Codes int8 (O, I) and scale of the latent weight as the forward uses them."""
        return self.spec.quantize(self.weight.detach(), self.weight_scale)

    @torch.no_grad()
    def update_scale(self, second_moment: Tensor | None) -> None:
        """Refresh the loss-aware scale with curvature sqrt(v), v Adam's second moment (Hou & Kwok, section 3)."""
        cold = not bool((self.weight_scale > 0).all())
        curvature = None if second_moment is None else second_moment.to(self.weight.dtype).sqrt()
        scale = lat_scale(
            self.weight,
            curvature,
            self.spec.granularity,
            self.spec.group_size,
            **({} if cold else {"start": self.weight_scale, "iterations": 1}),
        )
        self.weight_scale.copy_(scale)


class TokenMask:
    """Which tokens (B, T) of a batch are real, told to a layer before it runs: to each thread those of its own.

    A thread that was told nothing has what was told last: one of autograd's, that runs a checkpointed layer again.
    """

    def __init__(self):
        self.last: Tensor | None = None
        self.compiled = False  # whether a graph was told it, which knows of no threads
        self._of_thread: dict[int, Tensor | None] = {}

    def tell(self, mask: Tensor | None) -> None:
        self.last, self.compiled = mask, torch.compiler.is_compiling()
        if not self.compiled:
            self._of_thread[threading.get_ident()] = mask

    def now(self) -> Tensor | None:
        if self.compiled or torch.compiler.is_compiling():
            return self.last
        return self._of_thread.get(threading.get_ident(), self.last)


class _QuantizedInput:
    """The input side of QuantLinear and PackedLinear: `input_quantizer`, or one that belongs to another module."""

    token_mask: TokenMask

    def _init_input(self, quantizer: InputQuantizer | None, shared: bool) -> None:
        self.token_mask = TokenMask()
        self.input_quantizer = quantizer if isinstance(quantizer, nn.Module) and not shared else None
        self._activation = (quantizer,) if self.input_quantizer is None else ()  # in a tuple it is no submodule

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.token_mask = TokenMask()
        return replica

    @property
    def activation(self) -> InputQuantizer | None:
        """Quantizer of the input, None in full precision."""
        return self._activation[0] if self._activation else self.input_quantizer

    @property
    def shares_input(self) -> bool:
        """Whether the quantizer's state belongs to another module: query, key and value read the same tensor."""
        return bool(self._activation)


class QuantLinear(_LatentMixin, _QuantizedInput, nn.Linear):
    """nn.Linear with a fake-quantized weight and, unless `activation` is None, fake-quantized input.

    With two planes, weight and bias have a leading dim P; their outputs are added. `source` names, in a tuple so that
    it is no submodule, the embedding whose codes and scales a tied decoder uses.
    """

    def __init__(
        self,
        linear: nn.Linear,
        spec: WeightSpec,
        activation: InputQuantizer | None,
        source: tuple["QuantEmbedding", ...] = (),
        shares_input: bool = False,
    ):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.source = linear.weight, linear.bias, source
        self._init_input(activation, shares_input)
        if source:
            self.spec, self.weight = spec, source[0].weight
            self.register_buffer("weight_scale", None)
            return
        self._init_spec(spec, linear.weight.device)
        if spec.planes > 1 and self.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().expand(spec.planes, -1) / spec.planes)

    def quantize_weight(self) -> Quantized:
        return self.source[0].quantize_weight() if self.source else super().quantize_weight()

    def summed_bias(self) -> Tensor | None:
        """Bias (O,) of all planes together."""
        return self.bias if self.bias is None or self.bias.dim() == 1 else self.bias.sum(0)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x, self.weight, flatten_planes(self.quantize_weight()), self.summed_bias())


def check_ids(input_ids: Tensor, rows: int) -> None:
    """Clear error for ids that an embedding of `rows` rows lacks; only on CPU, another device would have to wait."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, found {input_ids.dtype}")
    if input_ids.device.type != "cpu" or not input_ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"input_ids must be in [0, {rows - 1}] (vocab_size {rows}), found {low if low < 0 else high}")


class QuantEmbedding(_LatentMixin, nn.Embedding):
    """nn.Embedding whose rows are fake-quantized; with one scale per row only the rows looked up are quantized."""

    def __init__(self, embedding: nn.Embedding, spec: WeightSpec):
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta"
        )
        self.weight = embedding.weight
        self._init_spec(spec, embedding.weight.device)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_ids(input_ids, self.num_embeddings)
        if self.spec.planes > 1:
            return sum(self._look_up(input_ids, plane) for plane in self.weight)
        return self._look_up(input_ids, self.weight)

    def _look_up(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """Fake-quantized rows of one plane (V, C)."""
        latent = F.embedding(input_ids, weight, self.padding_idx)
        if self.spec.granularity == "per_tensor":
            plane = self.spec.quantize(weight.detach(), self.weight_scale)
            rows = F.embedding(input_ids, dequantize_weight(plane, self.spec.group_size))
        else:
            scale = None if self.weight_scale is None else self.weight_scale[input_ids.flatten()]
            quantized = self.spec.quantize(latent.detach().flatten(0, -2), scale)
            rows = dequantize_weight(quantized, self.spec.group_size).view_as(latent)
        return StraightThrough.apply(latent, rows.to(latent.dtype))


def _linear(
    layer: "QuantLinear | PackedLinear",
    x: Tensor,
    latent: Tensor | None,
    weight: Quantized,
    bias: Tensor | None,
    sums: Tensor | None = None,
) -> Tensor:
    """Linear layer of the codes (P * O, I) that belong to the latent weight (O, I) or (P, O, I), None when packed."""
    spec = layer.spec
    if layer.activation is None:
        value = dequantize_weight(weight, spec.group_size)
        if spec.planes > 1:
            value = value.view(spec.planes, -1, value.shape[-1])
        value = value if latent is None else StraightThrough.apply(latent, value)
        return F.linear(x, (value.sum(0) if spec.planes > 1 else value).to(x.dtype), bias)
    carrier, activation = _quantize_input(x, layer.activation, layer.token_mask.now())
    rows = carrier.reshape(-1, x.shape[-1])
    y = quantized_linear(rows, latent, bias, activation, weight, spec.bound, spec.group_size, sums, spec.planes)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


_last_input = threading.local()  # query, key and value read one tensor: it is quantized once


def _quantize_input(x: Tensor, quantizer: InputQuantizer, token_mask: Tensor | None) -> tuple[Tensor, Quantized]:
    """(x for the backward pass, int8 codes (N, I) of x (..., I) with scale and offset (N, 1) or (1, 1))."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        identity = id(quantizer) if isinstance(quantizer, nn.Module) else quantizer
        version = x._version if not x.is_inference() else None
        key = (identity, version, id(token_mask), torch.is_grad_enabled())
        previous, previous_key, result = getattr(_last_input, "value", (None, None, None))
        if previous is not None and previous() is x and previous_key == key and version is not None:
            return result if result[0] is not None else (x, result[1])
    valid = token_mask.unsqueeze(-1) if token_mask is not None and token_mask.shape == x.shape[:-1] else None
    found = quantize_rows(x, quantizer, valid)
    if found is None:
        carrier, (codes, scale, offset) = quantize_signed(x, quantizer, valid)
        with torch.no_grad():
            codes = codes.to(torch.int8).view(-1, x.shape[-1])
            offset = None if offset is None else offset.view(-1, 1)
            found = carrier, Quantized(codes, scale.view(-1, 1), offset)
    carrier, quantized = found
    if not compiling:
        _last_input.value = (weakref.ref(x), key, (None if carrier is x else carrier, quantized))
    return carrier, quantized


def quantize_signed(x: Tensor, quantizer: InputQuantizer, valid: Tensor | None = None) -> tuple[Tensor, Quantized]:
    """(x for the backward pass, float whole codes of x (..., I) within int8, with scale and offset (..., 1))."""
    carrier, (codes, scale, offset) = quantize(x, quantizer, valid)
    if getattr(quantizer, "most", 0) > 127:  # unsigned 8-bit codes
        with torch.no_grad():
            codes, offset = codes - 128, scale * 128 + (0 if offset is None else offset)
    return carrier, Quantized(codes, scale, offset)


class FixedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose answers in eval mode are those of `ops.layer_norm`; training uses torch's faster kernel."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else layer_norm(x, self.weight, self.bias, self.eps)


class FixedGELU(nn.Module):
    """GELU whose answers in eval mode are those of `ops.gelu`; training uses torch's faster kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.training else gelu(x)


class FastDropout(nn.Dropout):
    """nn.Dropout by `ops.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


class _PackedMixin:
    """What PackedLinear and PackedEmbedding share: uint8 bits, scales that no cast of the model touches."""

    weight: Tensor
    weight_scale: Tensor
    spec: WeightSpec
    columns: int
    packing: str

    def _init_packed(self, rows: int, columns: int, spec: WeightSpec, packing: str, device) -> None:
        self.spec, self.columns, self.packing = spec, columns, spec.packing(packing)
        shape = spec.shape(rows, packed_columns(columns, self.packing))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        shape = spec.shape(*scale_shape(rows, columns, spec.granularity, spec.group_size))
        self.register_buffer("weight_scale", torch.ones(shape, dtype=spec.scale_dtype, device=device))

    def load_quantized(self, quantized: Quantized) -> None:
        """Take codes (O, I) or (P, O, I) and scale as this layer's state."""
        self.weight = pack_codes(quantized.codes, self.packing)
        self.weight_scale = quantized.scale.detach().to(self.spec.scale_dtype).clone()

    def quantize_weight(self) -> Quantized:
        """Codes int8 and scale, as `quantize_weight` of the latent layer gave them."""
        return Quantized(unpack_codes(self.weight, self.columns, self.packing), self.weight_scale.float())

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != self.spec.scale_dtype:  # .to(bf16) moves the layer but must not round its scales
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class PackedLinear(_PackedMixin, _QuantizedInput, nn.Module):
    """Linear layer of packed codes. Not an nn.Linear: there is no float weight to train, merge or cast.

    A decoder tied to the word embedding (`source`, as in `QuantLinear`) has no bits of its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: WeightSpec,
        activation: InputQuantizer | None,
        packing: str,
        tied: bool = False,
        shares_input: bool = False,
        device=None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.source: tuple[PackedEmbedding, ...] = ()
        self._init_packed(out_features, in_features, spec, packing, device)
        if tied:
            del self.weight, self.weight_scale
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self._init_input(activation, shares_input)
        self._codes = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and traced_linear is not None:
            y = traced_linear(self, x)
            if y is not None:
                return y
        weight, sums = self._runtime_weight()
        return _linear(self, x, None, weight, self.bias, sums)

    def _runtime_weight(self) -> tuple[Quantized, Tensor | None]:
        """Codes (P * O, I), scale and scaled sums of codes. int8 codes (a quarter of fp32) and sums are kept after the
        first use where an integer product uses them; otherwise every use unpacks."""
        if self._codes is not None:
            return self._codes
        weight = flatten_planes(self.quantize_weight())
        if self.activation is None or torch.compiler.is_compiling():
            return weight, None
        if has_fast_int8(weight.codes.device):
            sums = scaled_code_sums(weight, self.spec.bound, self.spec.group_size, self.spec.planes)
            self._codes = (weight, sums)
        return weight, None

    def quantize_weight(self) -> Quantized:
        return self.source[0].quantize_weight() if self.source else super().quantize_weight()

    def _apply(self, fn, recurse=True):
        self._codes = None
        return nn.Module._apply(self, fn, recurse) if self.source else super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_codes": None}

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._codes = None
        super()._load_from_state_dict(*args, **kwargs)

    def load_quantized(self, quantized: Quantized) -> None:
        super().load_quantized(quantized)
        self._codes = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}, packing={self.packing}"


class PackedEmbedding(_PackedMixin, nn.Module):
    """Embedding of packed codes; only the rows looked up are unpacked. It answers in `dtype`, which a cast changes."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: WeightSpec,
        packing: str,
        padding_idx: int | None = None,
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._init_packed(num_embeddings, embedding_dim, spec, packing, device)

    def forward(self, input_ids: Tensor) -> Tensor:
        check_ids(input_ids, self.num_embeddings)
        rows = input_ids.flatten()
        scale = self.weight_scale if self.weight_scale.shape[-2] == 1 else self.weight_scale[..., rows, :]
        codes = unpack_codes(self.weight[..., rows, :], self.columns, self.packing)
        value = dequantize_weight(Quantized(codes, scale.float()), self.spec.group_size)
        value = sum(value) if self.spec.planes > 1 else value
        return value.view(*input_ids.shape, self.embedding_dim).to(self.dtype)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}, packing={self.packing}"


@torch.no_grad()
def pack_layer(layer: nn.Module, packing: str) -> PackedLinear | PackedEmbedding:
    """Packed layer of the codes and scales that a latent or packed layer computes with."""
    packed = empty_packed_layer(layer, packing)
    if not getattr(layer, "source", ()):
        packed.load_quantized(layer.quantize_weight())
    if isinstance(packed, PackedLinear) and layer.bias is not None:
        bias = layer.summed_bias() if isinstance(layer, QuantLinear) else layer.bias
        packed.bias = nn.Parameter(bias.detach().clone())
    return packed


def empty_packed_layer(layer: nn.Module, packing: str) -> PackedLinear | PackedEmbedding:
    """Packed layer of the shape of a latent or packed one, on its device, still without weights."""
    source = getattr(layer, "source", ())
    device = (source[0] if source else layer).weight.device
    if isinstance(layer, QuantLinear | PackedLinear):
        return PackedLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.spec,
            layer.activation,
            packing,
            tied=bool(source),
            shares_input=layer.shares_input,
            device=device,
        )
    return PackedEmbedding(
        layer.num_embeddings,
        layer.embedding_dim,
        layer.spec,
        packing,
        padding_idx=layer.padding_idx,
        device=device,
        dtype=layer.dtype if isinstance(layer, PackedEmbedding) else layer.weight.dtype,
    )
