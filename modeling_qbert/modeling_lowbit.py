"""What every low-bit model adds to its Transformers class: quantized layers, packing, strict loading."""

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertLayer, BertPooler
from transformers.models.electra.modeling_electra import (
    ElectraClassificationHead,
    ElectraLayer,
    ElectraSequenceSummary,
)
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaLayer, RobertaPooler

from .attention import quantized_attention
from .checkpoint import WEIGHTS_FILE, CheckpointError, ShapeError, canonicalize_header, check_folder, stale_weights
from .configuration_qbert import LowBitConfig, low_bit_fields
from .fused import become, fused_forward_of
from .integration import MODEL_CLASSES, QbertConfig, QbertQuantizer, link_decoder, register_quantizer
from .layers import (
    FastDropout,
    FixedGELU,
    FixedLayerNorm,
    PackedEmbedding,
    PackedLinear,
    QuantEmbedding,
    QuantLinear,
    WeightSpec,
    pack_layer,
)
from .lora import refuse_adapters
from .memory import own_memory
from .ops import dequantize_weight
from .packing import PACKINGS
from .quantizers import ACTIVATION_FLOORS, MIN_STEP, ActivationQuantizer, LsqQuantizer, PactQuantizer, scale_shape


# Modules all of whose linear layers are quantized, and modules that do the pooler's work: a dense layer and its
# activation between encoder and classifier (the pooler is quantized in TernaryBERT's code; the classifier is not).
_ENCODER_LAYERS = (BertLayer, RobertaLayer, ElectraLayer)
_POOLERS = (BertPooler, RobertaPooler, RobertaClassificationHead, ElectraClassificationHead)
_LAYERS = QuantLinear | QuantEmbedding | PackedLinear | PackedEmbedding


@contextmanager
def _constructible(config: LowBitConfig) -> Iterator[None]:
    """While Transformers builds a model: its classes refuse heads that do not divide the hidden size."""
    heads = config.num_attention_heads
    if config.head_dim is not None:
        config.num_attention_heads = 1
    try:
        yield
    finally:
        config.num_attention_heads = heads


def _check_modules(config: LowBitConfig, linears: set[str]) -> None:
    """Modules named in the config exist; those of a head may belong to another head."""
    for field in ("split_modules", "ternary_modules"):
        names = set(getattr(config, field) or ()) - linears - {"embeddings.word_embeddings"}
        unknown = sorted(name for name in names if name.startswith(("encoder.", "embeddings.")))
        if unknown:
            raise ValueError(
                f"config field `{field}` names {unknown[:3]}, which are not quantized here; known are "
                f"embeddings.word_embeddings, {', '.join(sorted(linears)[:3])}, ..."
            )


def check_inputs(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-forward hook of the backbone: clear errors for shapes that it cannot take."""
    given = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if given is None else given
    if given is None or torch.compiler.is_compiling():
        return
    if given.dim() < 2 or 0 in given.shape:
        raise ValueError(f"input_ids must be (B, T), at least one sentence of one token, found {list(given.shape)}")
    positions = module.embeddings.position_embeddings
    limit = positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
    if given.shape[1] > limit:
        raise ValueError(f"input has {given.shape[1]} tokens, this model has {limit} positions; truncate the text")
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is not None and mask.dim() == 2 and mask.shape != given.shape[:2]:
        raise ValueError(f"attention_mask must be {list(given.shape[:2])} as the input, found {list(mask.shape)}")


def share_token_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pre-forward hook of the backbone when a range, or a first step size, spans the batch: tells linear layers which
    tokens are padding."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    mask = mask.bool() if mask is not None and mask.dim() == 2 else None
    for layer in module.modules():
        if isinstance(layer, QuantLinear | PackedLinear):
            layer.token_mask.tell(mask)


def refuse_offloaded(model: nn.Module, action: str) -> None:
    """Clear error for a model some of whose tensors accelerate keeps elsewhere: their values cannot be read here."""
    away = next((name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"), None)
    if away is not None:
        raise ValueError(f"tensor {away!r} is offloaded; load the model with every part on a device to {action} it")


class LowBitMixin:
    """Mixed in before a Transformers BERT, RoBERTa or ELECTRA class.

    latent: `QuantLinear` and `QuantEmbedding` hold fp32 latent weights under the backbone's own names and
    fake-quantize in forward. packed: after `pack()`, or loaded from a packed checkpoint, they hold bits and scales.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        forward = fused_forward_of(cls)
        if forward is not None:
            cls.forward = forward

    def __init__(self, config, *args, **kwargs):
        with _constructible(config):
            super().__init__(config, *args, **kwargs)
        backbone = self.base_model
        for family_class in MODEL_CLASSES.values():
            if issubclass(self.config_class, family_class.config_class) and type(backbone) in family_class.__bases__:
                become(backbone, family_class)
        self._resize_heads()
        self._insert_quantizers()
        for module in self.modules():
            if getattr(module, "_require_grads_hook", None) is not None:
                module.enable_input_require_grads()  # its hook was on the embedding that has just been replaced

    def _resize_heads(self) -> None:
        """Give every attention the heads of a pruned model, whose width together is not the hidden size."""
        heads, head_dim, hidden = self.config.num_attention_heads, self.config.head_dim, self.config.hidden_size
        if head_dim is None:
            return
        for owner in [module for module in self.modules() if hasattr(module, "query") and hasattr(module, "scaling")]:
            owner.num_attention_heads, owner.attention_head_size = heads, head_dim
            owner.all_head_size, owner.scaling = heads * head_dim, head_dim**-0.5
            for name in ("query", "key", "value"):
                setattr(owner, name, self._new_linear(getattr(owner, name), hidden, heads * head_dim))
        for layer in [module for module in self.modules() if isinstance(module, _ENCODER_LAYERS)]:
            for output in (module.output for module in layer.children() if hasattr(module, "self")):
                output.dense = self._new_linear(output.dense, heads * head_dim, hidden)

    def _new_linear(self, old: nn.Linear, columns: int, rows: int) -> nn.Linear:
        if (old.in_features, old.out_features) == (columns, rows):
            return old
        linear = nn.Linear(columns, rows, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        if linear.weight.device.type != "meta":
            self._init_weights(linear)
        return linear

    def _insert_quantizers(self) -> None:
        config = self.config
        prefix = "" if self.base_model is self else self.base_model_prefix + "."
        linears = self._linears_to_quantize()
        _check_modules(config, {name.removeprefix(prefix) for name in linears})
        quantizers = self._insert_learned_quantizers()
        for name, linear in linears.items():
            spec = config.weight_spec(name.removeprefix(prefix))
            if spec is not None:
                owner = self.get_submodule(name.rpartition(".")[0])
                shared = getattr(owner, "input_quantizer", None) if hasattr(owner, "query") else None
                quantizer = shared or quantizers(name, linear.in_features)
                self.set_submodule(name, QuantLinear(linear, spec, quantizer, shares_input=shared is not None))
        spec = config.embedding_spec("embeddings.word_embeddings")
        if spec is not None:
            decoder = self.get_output_embeddings()
            embeddings = QuantEmbedding(self.get_input_embeddings(), spec)
            self.set_input_embeddings(embeddings)
            if decoder is not None and config.tie_word_embeddings:
                name = next(name for name, module in self.named_modules() if module is decoder)
                quantizer = quantizers(name, decoder.in_features)
                self.set_submodule(name, QuantLinear(decoder, spec, quantizer, (embeddings,)))
        if config.position_spec is not None:
            owner = self.base_model.embeddings
            owner.position_embeddings = QuantEmbedding(owner.position_embeddings, config.position_spec)
        if config.bit_widths[2] != 32:
            self._fix_float_steps()
            for layer in self.modules():
                if isinstance(layer, _ENCODER_LAYERS):
                    layer.attention.self.quantized_attention = quantized_attention
        self.base_model.register_forward_pre_hook(check_inputs, with_kwargs=True)
        if config.bit_widths[2] != 32 and config.activation_granularity == "per_tensor":
            self.base_model.register_forward_pre_hook(share_token_mask, with_kwargs=True)
        self.update_scales(None)

    def _fix_float_steps(self) -> None:
        """Swap the float steps between two quantized products: a code must not depend on how a kernel rounds."""
        for name, module in list(self.base_model.named_modules()):
            if type(module) is nn.LayerNorm:
                self.base_model.set_submodule(name, FixedLayerNorm(module))
            elif type(module) is nn.Dropout:
                self.base_model.set_submodule(name, FastDropout(module.p))
            elif isinstance(getattr(module, "intermediate_act_fn", None), GELUActivation):
                module.intermediate_act_fn = FixedGELU()

    def _linears_to_quantize(self) -> dict[str, nn.Linear]:
        """Name -> linear layer of the encoder layers and of what does the pooler's work."""
        linears = {}
        for name, module in self.named_modules():
            if isinstance(module, ElectraSequenceSummary) and isinstance(module.summary, nn.Linear):
                linears[f"{name}.summary"] = module.summary
            elif isinstance(module, _POOLERS):
                linears[f"{name}.dense"] = module.dense
            elif isinstance(module, _ENCODER_LAYERS):
                children = module.named_modules(prefix=name)
                linears |= {child: linear for child, linear in children if type(linear) is nn.Linear}
        return linears

    def _insert_learned_quantizers(self):
        """Put learned activation quantizers into the attention modules.

        Returns the function (name, columns) -> quantizer of the input of any other linear layer.
        """
        config, positions = self.config, self.config.max_position_embeddings
        heads = config.num_attention_heads
        kind, bits = config.activation_quantizer, config.bit_widths[2]
        if bits == 32 or kind not in ("lsq", "pact"):
            return lambda name, columns: config.activation_quantizer_spec  # noqa: ARG005

        def learned(
            columns: int, above: float | None = None, channels: int | None = None
        ) -> LsqQuantizer | PactQuantizer:
            """Symmetric, or `above` a floor."""
            if kind == "lsq":
                return LsqQuantizer(bits, above, columns * positions, channels or columns)
            dynamic = ActivationQuantizer(bits, above is None, config.activation_granularity == "per_tensor")
            return PactQuantizer(dynamic)

        second = set()  # names of second feed-forward matrices, which read what an activation function gives
        for name, layer in self.named_modules():
            if not isinstance(layer, _ENCODER_LAYERS):
                continue
            second.add(f"{name}.output.dense")
            attention = layer.attention.self
            for part in ("query", "key", "value"):
                width = attention.attention_head_size
                attention.register_module(f"{part}_quantizer", learned(attention.all_head_size, channels=width))
            attention.input_quantizer = learned(config.hidden_size)
            if kind == "lsq":
                attention.probability_quantizer = learned(heads * positions, above=0.0)
        floor = ACTIVATION_FLOORS.get(config.hidden_act)
        return lambda name, columns: learned(columns, floor if name in second else None)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if self.config.bit_widths[2] == 32 or attn_implementation in ("qbert", "qbert_scores"):
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation {attn_implementation!r} would not quantize Q, K, V and probabilities; "
                "a model with quantized activations has 'qbert' (the default) or 'qbert_scores'"
            )
        return super()._check_and_adjust_attn_implementation("qbert", *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # A full-precision checkpoint has no scales, steps and clips: they are not missing, each starts as when new.
        state = {}
        for name in loading_info.missing_keys:
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            if leaf == "weight_scale" or isinstance(module, LsqQuantizer | PactQuantizer):
                state[name] = module
        for name, module in state.items():
            if isinstance(module, LsqQuantizer | PactQuantizer):
                module.reset()
            else:
                self.get_buffer(name).zero_()
        loading_info.missing_keys = loading_info.missing_keys - set(state)
        super()._adjust_missing_and_unexpected_keys(loading_info)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, strict: a missing backbone tensor is an error that names it."""
        source = os.path.join(str(pretrained_model_name_or_path), *filter(None, [kwargs.get("subfolder")]))
        if os.path.isfile(os.path.join(source, "config.json")):
            check_folder(source)
        register_quantizer()
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except (ValueError, SafetensorError, RuntimeError) as error:
            foreign = isinstance(error, RuntimeError) and "mismatch" not in str(error)
            if foreign or (isinstance(error, CheckpointError) and source in str(error)):
                raise
            kind = ShapeError if isinstance(error, RuntimeError) else CheckpointError
            raise kind(f"{source}: {error}") from error
        types = getattr(getattr(model, "hf_quantizer", None), "float_dtypes", {model.dtype})
        if kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) in ("auto", None) and model.dtype not in types:
            raise CheckpointError(f"{source}/config.json: field 'dtype' is {model.dtype}, the file holds {types}")
        prefix = "" if model.base_model is model else model.base_model_prefix + "."
        missing = sorted(
            name for name in info["missing_keys"] if name.startswith(prefix) and ".pooler." not in "." + name
        )
        if missing:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: {len(missing)} tensors of the {model.base_model_prefix} "
                f"backbone are missing: {missing[:5]}"
            )
        own_memory(model)
        model.update_scales(None)
        return (model, info) if output_loading_info else model

    @property
    def is_packed(self) -> bool:
        """Whether this model holds bits instead of latent weights."""
        return getattr(self, "hf_quantizer", None) is not None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`.

        Raises:
            ValueError: the word embedding is packed or has two planes.
        """
        embedding = self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        spec = getattr(embedding, "spec", None)
        if isinstance(embedding, PackedEmbedding) or spec and spec.planes > 1:
            raise ValueError("a word embedding that is packed or has two planes cannot be resized; resize its origin")
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        scale = getattr(embedding, "weight_scale", None)
        if scale is not None:  # that of the loss-aware quantizer
            shape = scale_shape(*embedding.weight.shape, spec.granularity, spec.group_size)
            embedding.weight_scale = scale.new_zeros(shape)
            self.update_scales(None)
        return embedding

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As at birth: upstream's pattern for the word embedding's weight also matches the scale beside it."""
        found = vars(self).get("all_tied_weights_keys")
        if not found:
            return super().get_expanded_tied_weights_keys(all_submodels)
        return dict(found) if self.config.tie_word_embeddings else {}

    @torch.no_grad()
    def update_scales(self, second_moments: Mapping[str, Tensor] | None) -> None:
        """Refresh the scales of loss-aware layers; nothing to do for others.

        Args:
            second_moments: parameter name -> Adam's second moment of that weight (O, I). `None` only computes scales
                that were never computed, with curvature 1.
        """
        for name, module in self.named_modules():
            scale = getattr(module, "weight_scale", None)
            if not isinstance(module, QuantLinear | QuantEmbedding) or scale is None or scale.device.type == "meta":
                continue
            if second_moments is None and bool((scale > 0).all()):
                continue
            module.update_scale(None if second_moments is None else second_moments.get(f"{name}.weight"))

    @property
    def split_weights(self) -> dict[str, str]:
        """Granularity of every latent weight of two planes, by the parameter's name."""
        kinds = QuantLinear | QuantEmbedding
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, kinds)}
        return {
            f"{name}.weight": layer.spec.granularity
            for name, layer in layers.items()
            if layer.spec.planes == 2 and not getattr(layer, "source", ())
        }

    def weight_spec_of(self, parameter: str) -> WeightSpec | None:
        """How a weight is quantized, by the parameter's name; None in full precision."""
        return getattr(self.get_submodule(parameter.removesuffix(".weight")), "spec", None)

    @torch.no_grad()
    def calibrate(self, *args, **kwargs) -> None:
        """Give every learned step size that has none its first value, from one batch (the arguments of `forward`).

        `DistillationTrainer` does so with the first rows of its training data. Models without step sizes ignore it.
        """
        steps = [module for module in self.modules() if isinstance(module, LsqQuantizer)]
        if not steps:
            return
        training = self.training
        hook = self.base_model.register_forward_pre_hook(share_token_mask, with_kwargs=True)
        try:
            for module in steps:
                module.calibrating = True
            self.eval()(*args, **kwargs)
        finally:
            for module in steps:
                module.calibrating = False
            hook.remove()
            share_token_mask(self.base_model, (), {})
            self.train(training)

    @torch.no_grad()
    def hold_steps(self) -> None:
        """Bring learned step sizes that an update carried to 0 or below back to the least that is computed with."""
        for module in self.modules():
            if isinstance(module, LsqQuantizer) and module.ready:
                module.step.clamp_(min=MIN_STEP)

    @torch.no_grad()
    def pack(self, packing: str = "2bit") -> PreTrainedModel:
        """A packed copy of this model: same codes, same scales, same logits.

        Args:
            packing: layout of ternary codes, `"2bit"` (4 codes a byte) or `"dense"` (5 codes a byte).

        Called on a packed model it changes the layout.
        """
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {PACKINGS}, found {packing!r}")
        if not any(isinstance(module, _LAYERS) for module in self.modules()):
            raise ValueError(f"config field `bits` is {self.config.bits!r}: there is nothing to pack")
        for name, module in self.named_modules():
            if isinstance(module, LsqQuantizer) and not bool(module.step != 0):
                raise ValueError(f"{name}.step has no value yet: call model.calibrate(**batch) before packing")
        refuse_adapters(self, "pack")
        refuse_offloaded(self, "pack")
        model = copy.deepcopy(self).eval()
        if "_original_forward" in vars(model):  # the mixed precision that accelerate leaves behind a training
            del model.forward, model._original_forward
            model._is_accelerate_prepared = False
        for name, module in list(model.named_modules()):
            if isinstance(module, _LAYERS):
                model.set_submodule(name, pack_layer(module, packing))
            elif isinstance(module, LsqQuantizer):
                module.step.clamp_(min=MIN_STEP)  # as it is computed with: a plain Trainer lets it fall below 0
        link_decoder(model)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.hf_quantizer = QbertQuantizer(QbertConfig(packing=packing), pre_quantized=True)
        model.is_quantized, model.quantization_method = True, "qbert"
        model.hf_quantizer.postprocess_model(model)
        return model

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A plain Transformers model whose weights are scale * codes; its activations are full precision.

        A pruned network and one with ghost features, which no plain class can hold, stay in their own class with
        `bits` 32-32-32.
        """
        refuse_adapters(self, "dequantize")
        refuse_offloaded(self, "dequantize")
        config = self.config
        fields = config.to_dict()
        for name in (*low_bit_fields(), "quantization_config", "model_type", "architectures", "auto_map", "dtype"):
            fields.pop(name, None)
        if config.head_dim is None and not hasattr(config, "ghost_placement"):
            target = next(base for base in type(self).__mro__ if base.__module__.startswith("transformers."))
        else:
            target = type(self)
            fields |= {"bits": "32-32-32", "head_dim": config.head_dim}
        without_pooler = self.base_model is self and getattr(self, "pooler", True) is None
        model = target(target.config_class(**fields), **({"add_pooling_layer": False} if without_pooler else {}))
        own = tuple(name for name, module in self.named_modules() if isinstance(module, LsqQuantizer | PactQuantizer))
        state = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.endswith("weight_scale") and not name.startswith(own)
        }
        for name, module in self.named_modules():
            if isinstance(module, _LAYERS):
                value = dequantize_weight(module.quantize_weight(), module.spec.group_size)
                state[f"{name}.weight"] = value.sum(0) if value.dim() == 3 else value
            if isinstance(module, QuantLinear) and module.bias is not None:
                state[f"{name}.bias"] = module.summed_bias()
        model.load_state_dict(state)
        return model.to(device=self.device, dtype=dtype).eval()

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, *args, push_to_hub: bool = False, **kwargs
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the code that opens it where this package is missing. A packed
        model is written beside its target and then moved into place, and the same model gives the same bytes; it has
        no `variant`."""
        self.config.auto_map = dict(self.config_class.remote_code)
        adapters_alone = getattr(self, "_hf_peft_config_loaded", False)  # of `add_adapter`: only they are saved
        if not adapters_alone:
            refuse_adapters(self, "save")
        if not self.is_packed or adapters_alone or not is_main_process:
            return super().save_pretrained(save_directory, is_main_process, *args, push_to_hub=push_to_hub, **kwargs)
        if kwargs.get("variant") is not None:
            raise ValueError(f"variant: a packed checkpoint is one file {WEIGHTS_FILE}, found {kwargs['variant']!r}")
        refuse_offloaded(self, "save")
        save_directory = os.fspath(save_directory)
        os.makedirs(save_directory, exist_ok=True)
        foreign = stale_weights(save_directory)
        if foreign:
            raise CheckpointError(f"{save_directory}: holds other weight files {foreign}; save to a clean folder")
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=save_directory) as staging:
            super().save_pretrained(staging, is_main_process, *args, **{**kwargs, "max_shard_size": "1000GB"})
            canonicalize_header(os.path.join(staging, WEIGHTS_FILE))
            for name in sorted(os.listdir(staging), key=lambda name: name != WEIGHTS_FILE):
                os.replace(os.path.join(staging, name), os.path.join(save_directory, name))
        if push_to_hub:
            names = inspect.signature(self.push_to_hub).parameters
            self.push_to_hub(repo_id, **{name: kwargs[name] for name in names if name in kwargs})
        return None
