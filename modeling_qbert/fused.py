"""The fused forward: one call of the native engine instead of a backbone's embeddings and encoder layers.

It answers in eval mode without gradients, on a packed model of float32 on the CPU, when nobody asks for hidden states,
attentions or scores and no hook looks inside. Everything else, and every input that the engine does not take, goes the
usual way through the layers, which gives the same answers.

Tokens that the mask hides are not computed: their rows of the last hidden state are 0.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, ElectraModel, RobertaModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert.modeling_bert import BertPooler
from transformers.models.roberta.modeling_roberta import RobertaPooler
from transformers.utils import logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .ghost import GhostFeatures
from .layers import FastDropout, FixedGELU, FixedLayerNorm, PackedEmbedding, PackedLinear
from .memory import lend_buffer, own_buffers, return_free_memory
from .ops import (
    WHY_NOT_NATIVE,
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
from .quantizers import ActivationQuantizer, LsqQuantizer


logger = logging.get_logger(__name__)

# They act on what is asked for only, or tell what the engine knows.
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "modeling_lowbit", "qbert.ghost")


class _NotFusedError(Exception):
    """Why the engine cannot run a model."""


class _Engine:
    """The native encoder of one backbone and the tensors it was made of."""

    def __init__(self, model: nn.Module):
        self.children, self.known_children = [], []
        self.hooks: list[dict] = []
        self.stores, self.names, self.tensors = [], [], []
        for module in model.modules():
            self.children.append(module._modules)
            self.known_children.append(dict(module._modules))
            if module is not model:
                self.hooks += module._forward_hooks, module._forward_pre_hooks
            for store in (module._parameters, own_buffers(module)):
                for name, tensor in store.items():
                    if tensor is not None and tensor.dtype != torch.int64:
                        self.stores.append(store)
                        self.names.append(name)
                        self.tensors.append(tensor)
        self.writable = list(self.tensors)
        self.versions = _versions(self.writable)
        # What the engine has copies of, but for bits and scales: writes through `.data` count no version.
        owners = (module for module in model.modules() if not isinstance(module, nn.Embedding))
        owned = chain.from_iterable(map(dict.values, (module._parameters for module in owners)))
        mine = [tensor for tensor in owned if tensor is not None and tensor.is_cpu and tensor.is_contiguous()]
        self.copies = [tensor.detach().clone() for tensor in mine]
        self.compared = (
            list(map(Tensor.data_ptr, mine)),
            list(map(Tensor.data_ptr, self.copies)),
            [tensor.nbytes for tensor in mine],
        )
        self.watchers: tuple = ()  # hooks when they were last looked at, none of which expects to be called
        self.encoder = self.pooler = None
        try:
            self.encoder, self.why = _native_encoder(model, self.lend), ""
            self.pooler = _native_pooler(model)
        except _NotFusedError as error:
            self.why = str(error) if self.encoder is None else ""

    def __reduce__(self):
        return _nothing, ()

    def lend(self, layer: PackedLinear, packed: Callable[[], Tensor]) -> None:
        """Leave the bits of a layer to the engine, of which `packed` asks them back."""
        place = next((i for i, t in enumerate(self.tensors) if t is dict.get(layer._buffers, "weight")), None)
        if place is None:  # someone replaced it meanwhile
            return
        me = weakref.ref(self)

        def take_back() -> Tensor:
            tensor, engine = packed(), me()
            if engine is not None:
                engine._watch(place, tensor)
            return tensor

        at = next(i for i, t in enumerate(self.writable) if t is self.tensors[place])
        for known in (self.writable, *self.versions):
            del known[at]
        self.tensors[place] = None
        lend_buffer(layer, "weight", take_back)
        self._watch(place, dict.get(self.stores[place], "weight"))

    def _watch(self, place: int, tensor: Tensor) -> None:
        self.tensors[place] = tensor
        if not tensor.is_meta:  # what stands for a lent tensor cannot be written to
            self.writable.append(tensor)
            for known, (now,) in zip(self.versions, _versions([tensor])):
                known.append(now)

    def is_stale(self) -> bool:
        """Whether a tensor or a module was replaced since, as by an adapter, or a tensor written to.

        Asked at every call: small models spend as long here as in a layer, hence the loops in C.
        """
        if self.children != self.known_children:
            return True
        if any(map(operator.is_not, map(dict.get, self.stores, self.names), self.tensors)):
            return True
        if _versions(self.writable) != self.versions:
            return True
        return self.encoder is not None and any(map(same_bytes, *self.compared))

    def is_watched(self) -> bool:
        """Whether a hook inside expects to be called."""
        watchers = tuple(chain.from_iterable(map(dict.values, filter(None, self.hooks))))
        if watchers != self.watchers:
            if not all(hook.__module__.endswith(_HARMLESS_HOOKS) for hook in watchers):
                return True
            self.watchers = watchers
        return False


def _nothing() -> None:
    return None


def _versions(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Changes with every write, and where `.data` is replaced, as a cast of the model does."""
    try:
        writes = list(map(_get_version, tensors))
    except RuntimeError:  # tensors of inference mode count no writes
        writes = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return writes, list(map(Tensor.data_ptr, tensors))


_get_version = operator.attrgetter("_version")


def fused(forward: Callable) -> Callable:
    """The forward of a backbone that asks the engine first."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        answer = None if torch.compiler.is_compiling() or torch.jit.is_tracing() else _answer(self, args, kwargs)
        return forward(self, *args, **kwargs) if answer is None else answer

    return wrapper


_BACKBONES = (BertModel, RobertaModel, ElectraModel)
_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def become(model: nn.Module, model_class: type) -> None:
    """Make the backbone inside a model with a head one of the family: it asks the engine first, and saves as such."""
    model.__class__ = model_class
    # Transformers looks up by the class's name what a model can record, and noted it when the model was made.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model_class), model._can_record_outputs)


def fused_forward_of(model_class: type) -> Callable | None:
    """The fused forward for a class that is itself a backbone and has its forward, None for one with a head or with a
    forward of its own."""
    bases = (base for base in _BACKBONES if issubclass(model_class, base) and model_class.forward is base.forward)
    return next((fused(base.forward) for base in bases), None)


def _answer(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The backbone's output, or None where the engine does not run."""
    if torch.is_grad_enabled() or model.training or torch.is_autocast_enabled("cpu"):
        return None
    given = dict(zip(_ARGUMENTS, args)) | kwargs
    ids, embedded, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    config = model.config
    asked = any(given.get(f"output_{name}", getattr(config, f"output_{name}", False)) for name in _RECORDED)
    plain = (
        given.keys() <= _TAKEN and all(given.get(name) is None for name in _UNUSED) and len(args) <= len(_ARGUMENTS)
    )
    if asked or not plain or (ids is None) == (embedded is None) or config._attn_implementation != "qbert":
        return None
    tensor = ids if embedded is None else embedded
    if tensor.device.type != "cpu" or (mask is not None and (mask.dim() != 2 or mask.shape != tensor.shape[:2])):
        return None
    if not any(type(module) is PackedLinear for module in model.encoder.modules()):
        return None
    engine = _engine(model)
    if engine is None:
        return None
    last = _last_hidden_state(model, engine, ids, embedded, mask, given)
    if last is None:
        return None
    if isinstance(model, ElectraModel):
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)
    else:
        pooled = None if model.pooler is None else _pool(model.pooler, engine, last)
        output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=last, pooler_output=pooled)
    as_dict = given.get("return_dict", getattr(config, "return_dict", True))
    return output.to_tuple() if as_dict is False else output


def _pool(pooler: nn.Module, engine: _Engine, last: Tensor) -> Tensor:
    if engine.pooler is None or pooler._forward_hooks or pooler._forward_pre_hooks:
        return pooler(last)
    return pooler.activation(engine.pooler(last))


_RECORDED = ("hidden_states", "attentions", "cross_attentions")
_UNUSED = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
_TAKEN = {*_ARGUMENTS, *_UNUSED, "return_dict", "use_cache", *(f"output_{name}" for name in _RECORDED)}


def _last_hidden_state(
    model: nn.Module, engine: _Engine, ids: Tensor | None, embedded: Tensor | None, mask: Tensor | None, given: dict
) -> Tensor | None:
    mask = None if mask is None else mask.bool().contiguous()
    types, positions = given.get("token_type_ids"), given.get("position_ids")
    if engine.encoder.tables is not None and ids is not None and ids.dtype in (torch.int64, torch.int32):
        tables = [
            None if part is None else part.expand_as(ids).long().contiguous() for part in (ids, types, positions)
        ]
        return engine.encoder(mask, None, *tables)
    embedded = model.embeddings(input_ids=ids, token_type_ids=types, position_ids=positions, inputs_embeds=embedded)
    if hasattr(model, "embeddings_project"):
        embedded = model.embeddings_project(embedded)
    return engine.encoder(mask, embedded.contiguous()) if embedded.dtype == torch.float32 else None


def _engine(model: nn.Module) -> _Engine | None:
    """The engine of a backbone, made at its first use and again when the model has changed."""
    engine = model.__dict__.get("_fused_engine")
    if engine is None or engine.is_stale():
        engine = model.__dict__["_fused_engine"] = None  # the old one holds tensors
        engine = model.__dict__["_fused_engine"] = _Engine(model)
        if engine.why:
            logger.warning_once(f"low-bit models run in plain torch: {engine.why}")
        else:
            logger.info("low-bit models run in the native engine")
    return None if engine.encoder is None or engine.is_watched() else engine


_Lend = Callable[[PackedLinear, Callable[[], Tensor]], None]


def _native_encoder(model: nn.Module, lend: _Lend) -> "NativeEncoder":
    if NativeEncoder is None:
        raise _NotFusedError(f"native engine {WHY_NOT_NATIVE}")
    config = model.config
    if config.is_decoder or config.hidden_act not in ("gelu", "relu") or not len(model.encoder.layer):
        raise _NotFusedError(f"the engine has no decoder and no {config.hidden_act!r}")
    layers = [_layer_weights(layer, lend) for layer in model.encoder.layer]
    attention = model.encoder.layer[0].attention.self
    heads, head_size = attention.num_attention_heads, attention.attention_head_size
    return NativeEncoder(
        layers,
        config.hidden_size,
        heads,
        head_size,
        model.encoder.layer[0].intermediate.dense.out_features,
        config.hidden_act,
        config.layer_norm_eps,
        _embedding_tables(model),
    )


def _native_pooler(model: nn.Module) -> "NativeDense | None":
    """The dense layer of the pooler; None where torch computes it."""
    pooler = getattr(model, "pooler", None)
    if type(pooler) not in (BertPooler, RobertaPooler) or type(pooler.dense) is not PackedLinear:
        return None
    return NativeDense(_weight([pooler.dense], pooler.dense.out_features), _place("pooler", pooler.dense.activation))


def _expect(module: nn.Module, kind: type) -> Any:
    if type(module) is not kind:
        raise _NotFusedError(f"it needs {kind.__name__}, found {type(module).__name__}")
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor is getattr(module, "weight_scale", None) and tensor.device.type == "cpu":
            continue  # of a type of its own, which no cast changes
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.uint8):
            raise _NotFusedError(f"it needs float32 on the CPU, found {tensor.dtype} on {tensor.device}")
    return module


def _norm(module: nn.Module) -> tuple[Tensor, Tensor]:
    module = _expect(module, FixedLayerNorm)
    return module.weight.detach(), module.bias.detach()


def _layer_weights(layer: nn.Module, lend: _Lend) -> "LayerWeights":
    attention = layer.attention.self
    if layer.is_decoder or layer.chunk_size_feed_forward:
        raise _NotFusedError("the engine has no decoder and no chunks")
    act = layer.intermediate.intermediate_act_fn
    if type(act) not in (FixedGELU, nn.ReLU):
        raise _NotFusedError(f"the engine has no {type(act).__name__}")
    linears = [layer.attention.output.dense, layer.intermediate.dense, layer.output.dense]
    for linear in (attention.query, attention.key, attention.value, *linears):
        if not isinstance(linear, PackedLinear):  # an adapter around it
            raise _NotFusedError(f"the engine has no {type(linear).__name__}")
    weights = LayerWeights(
        [_place(name, quantizer) for name, quantizer in _quantizers(attention, linears)],
        _weight([attention.query, attention.key, attention.value], attention.attention_head_size, lend),
        *[_weight([linear], linear.out_features, lend) for linear in linears],
        _norm(layer.attention.output.LayerNorm),
        _norm(layer.output.LayerNorm),
        (_ghosts(layer.attention.output.dropout), _ghosts(layer.output.dropout)),
    )
    return_free_memory()
    return weights


def _ghosts(dropout: nn.Module) -> "GhostWeights | None":
    if type(dropout) in (nn.Dropout, FastDropout):
        return None
    if type(_expect(dropout, GhostFeatures).activation) is not nn.ReLU:
        raise _NotFusedError(f"the engine has no ghost features with {type(dropout.activation).__name__}")
    kernels = dropout.kernels().detach().transpose(1, 2).contiguous()
    return GhostWeights(kernels, dropout.ghost_scale.detach().contiguous())


def _quantizers(attention: nn.Module, linears: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Of input, query, key, value, probabilities, context, hidden state and feed-forward."""
    yield "input", attention.query.activation
    dynamic = getattr(attention.config, "activation_quantizer_spec", None)
    for part in ("query", "key", "value", "probability"):
        yield part, getattr(attention, f"{part}_quantizer", dynamic)
    yield from zip(("context", "hidden", "feed-forward"), (linear.activation for linear in linears))


def _place(name: str, quantizer: Any) -> Any:
    inner = getattr(quantizer, "dynamic", quantizer)
    if not isinstance(inner, ActivationQuantizer | LsqQuantizer) or getattr(inner, "per_tensor", False):
        raise _NotFusedError("it needs quantized activations, with ranges per token or learned steps")
    return place_of(quantizer, signed=name != "probability")


def _weight(layers: list[nn.Module], run: int, lend: _Lend | None = None) -> "NativeWeight":
    """The rows of layers that read one input, as one weight: `run` rows of each in turn. `lend` leaves them to it.

    Beside a layer of two planes (adaptive splitting) one of one plane takes part as twice that plane at half its
    scale: the same product, to the bit.
    """
    layers = [_expect(layer, PackedLinear) for layer in layers]
    spec, packing, columns = layers[0].spec, layers[0].packing, layers[0].columns
    if any(replace(layer.spec, planes=spec.planes) != spec or layer.packing != packing for layer in layers):
        raise _NotFusedError("query, key and value must be quantized alike")
    planes = max(layer.spec.planes for layer in layers)
    groups = layers[0].weight_scale.shape[-1]
    if not supports(packing, groups, spec.group_size):
        raise _NotFusedError(f"it takes no layout {packing} in {groups} groups of {spec.group_size} columns")
    scales = [layer.weight_scale.float().view(layer.spec.planes, -1, groups) for layer in layers]
    scales = [scale * (scale.shape[0] / planes) for scale in scales]
    scales = [scale.expand(planes, layer.out_features, -1) for scale, layer in zip(scales, layers)]
    biases = [
        torch.zeros(layer.out_features, dtype=torch.float32, device="cpu")
        if layer.bias is None
        else layer.bias.detach()
        for layer in layers
    ]
    weight = NativeWeight(
        _joined([_bits_of(layer).expand(planes, -1, -1) for layer in layers], run, 1),  # no view outlives this call
        columns,
        packing,
        _joined(scales, run, 1),
        spec.group_size,
        _joined(biases, run, 0),
    )
    for index, layer in enumerate(layers if lend is not None else ()):
        place = (index * run, layer.out_features, run, len(layers) * run)
        lend(layer, functools.partial(_rows_of, weight, layer.spec.planes, *place))
    return weight


def _bits_of(layer: PackedLinear) -> Tensor:
    """uint8 (P, O, bytes)."""
    return layer.weight.view(layer.spec.planes, layer.out_features, -1)


def _rows_of(weight: "NativeWeight", planes: int, *place: int) -> Tensor:
    packed = weight.packed(*place)
    return packed[0].clone() if weight.planes > planes else packed


def _joined(parts: list[Tensor], run: int, dim: int) -> Tensor:
    """`run` rows of each part in turn, rows being dimension `dim`."""
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.stack([part.unflatten(dim, (-1, run)) for part in parts], dim + 1).flatten(dim, dim + 2)


def _embedding_tables(model: nn.Module) -> "EmbeddingTables | None":
    """What the engine looks tokens up in; None where the torch modules do it."""
    embeddings = model.embeddings
    words, tables = embeddings.word_embeddings, (embeddings.token_type_embeddings, embeddings.position_embeddings)
    if type(words) is not PackedEmbedding or hasattr(model, "embeddings_project"):
        return None
    if any(type(table) is not nn.Embedding or table.weight.dtype != torch.float32 for table in tables):
        return None
    _expect(words, PackedEmbedding)
    if not supports(words.packing):
        return None
    planes = words.spec.planes
    return EmbeddingTables(
        words.weight.view(planes, words.num_embeddings, -1),
        words.packing,
        words.weight_scale.float().view(planes, -1, words.weight_scale.shape[-1]),
        words.spec.group_size,
        *[table.weight.detach() for table in tables],
        _norm(embeddings.LayerNorm),
        embeddings.padding_idx if isinstance(model, RobertaModel) else -1,
    )
