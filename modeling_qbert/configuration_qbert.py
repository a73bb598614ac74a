"""Configurations: the backbone's own fields plus what makes a model low-bit, checked when a config is born."""

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, ElectraConfig, PreTrainedConfig, RobertaConfig
from transformers.activations import ACT2FN

from .checkpoint import CheckpointError
from .layers import WeightSpec
from .quantizers import ActivationQuantizer


Granularity = Literal["per_tensor", "per_row", "per_group"]

# Inclusive ranges of every whole number a model is built from: far above any BERT, below what would hang a machine.
_RANGES = {
    "vocab_size": (1, 2_000_000),
    "hidden_size": (1, 16_384),
    "embedding_size": (1, 16_384),
    "num_hidden_layers": (0, 128),
    "num_attention_heads": (1, 1_024),
    "head_dim": (1, 16_384),
    "intermediate_size": (1, 65_536),
    "max_position_embeddings": (1, 65_536),
    "type_vocab_size": (1, 1_024),
    "group_size": (1, 65_536),
}
# Fields younger than the first files of this format; a file leaves them out while they have their default, so that
# saving an old model again gives its old bytes.
_YOUNGER_FIELDS = ("binary_quantizer", "planes", "split_modules", "ternary_modules", "position_bits", "head_dim")
_MAX_PARAMETERS = 2_000_000_000
_LOW_BIT_WORD = re.compile(r"bits|quant|granularity|packing|planes|ghost")


@strict
class LowBitConfig(PreTrainedConfig):
    r"""
    Quantization fields that every low-bit config adds to its backbone's.

    Args:
        bits (`str`, *optional*, defaults to `"2-2-8"`):
            W-E-A: bits of encoder weights, word embedding and activations. 1 is binary {-1, +1}, 2 is ternary
            {-1, 0, +1}, 3, 4 and 8 are symmetric whole numbers, 32 is full precision; activations have 1, 2, 4, 8 or
            32. Quantized activations need quantized weights; 1 and 2 bits of them the quantizer `"lsq"`.
        weight_quantizer (`"twn"` or `"lat"`, *optional*, defaults to `"twn"`):
            Ternary quantizer: approximation based (TWN) or loss aware (LAT).
        weight_granularity, embedding_granularity (*optional*, default to `"per_tensor"` and `"per_row"`):
            One scale per matrix, per output row, or per `group_size` columns of a row. Defaults as TernaryBERT.
        group_size (`int`, *optional*, defaults to 64): Columns that share a scale with `"per_group"`.
        activation_quantizer (`"asymmetric"`, `"symmetric"`, `"pact"` or `"lsq"`, *optional*, defaults to
            `"asymmetric"`): Dynamic min-max range (TernaryBERT's paper is asymmetric, its released code symmetric);
            the same between two learned clips (BinaryBERT's A8); or one learned step size (BinaryBERT's A4). The last
            two are symmetric but for attention probabilities and the input of a layer's second feed-forward matrix.
        activation_granularity (`"per_token"` or `"per_tensor"`, *optional*, defaults to `"per_token"`):
            One dynamic range per token, or one over the whole batch as in the papers: predictions then depend on the
            batch. A learned step size belongs to no token and no batch.
        binary_quantizer (`"bwn"` or `"centered"`, *optional*, defaults to `"bwn"`):
            Binary quantizer: the sign of a weight, or of its distance from its group's mean (BiT).
        planes (`1` or `2`, *optional*, defaults to 1):
            Code matrices of a binary layer, which sums them: 1 is plain binary, 2 is the outcome of ternary weight
            splitting (BinaryBERT).
        split_modules (`list[str]`, *optional*):
            With 2 planes, the only modules that have two (adaptive splitting), named as in the backbone:
            `"encoder.layer.0.output.dense"`, `"embeddings.word_embeddings"`. `None` means all.
        ternary_modules (`list[str]`, *optional*):
            Modules held ternary although `bits` says binary: those that adaptive splitting is about to split.
        position_bits (`32` or `8`, *optional*, defaults to 32): Bits of the position embedding, one scale per row.
        head_dim (`int`, *optional*, defaults to `hidden_size / num_attention_heads`):
            Width of an attention head; width pruning keeps it while heads become fewer.
    """

    bits: str = "2-2-8"
    weight_quantizer: Literal["twn", "lat"] = "twn"
    weight_granularity: Granularity = "per_tensor"
    embedding_granularity: Granularity = "per_row"
    group_size: int = 64
    activation_quantizer: Literal["symmetric", "asymmetric", "pact", "lsq"] = "asymmetric"
    activation_granularity: Literal["per_token", "per_tensor"] = "per_token"
    binary_quantizer: Literal["bwn", "centered"] = "bwn"
    planes: Literal[1, 2] = 1
    split_modules: list[str] | None = None
    ternary_modules: list[str] | None = None
    position_bits: Literal[32, 8] = 32
    head_dim: int | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in `PreTrainedConfig`; the full-precision backbone's config is accepted, any other model type is not."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type", cls.model_type)
        accepted = [base.model_type for base in cls.__mro__ if getattr(base, "model_type", "")]
        if cls.model_type and found not in accepted:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}/config.json: field 'model_type' must be one of "
                f"{sorted(set(accepted))} to make a {cls.model_type} model, found {found!r}"
            )
        path = str(pretrained_model_name_or_path)
        return fields | {"model_type": cls.model_type or found, "name_or_path": path}, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in `PreTrainedConfig`; what is wrong with a file's fields is a `CheckpointError` that names the file."""
        path = kwargs.get("name_or_path") or config_dict.get("name_or_path")
        config_dict = {name: value for name, value in config_dict.items() if name != "name_or_path"}
        # Transformers sets overrides after birth, when nothing checks them any more.
        overrides = {name: kwargs.pop(name) for name in low_bit_fields(cls) if name in kwargs}
        try:
            return super().from_dict(config_dict | overrides, **kwargs)
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}/config.json: {error}" if path else str(error)) from error

    def validate_low_bit(self):
        """Run by `@strict` after birth and before saving: every error names the field, its range and its value."""
        weight, embedding, activation = self.bit_widths
        for name, value, allowed in (
            ("weights", weight, (1, 2, 3, 4, 8, 32)),
            ("embedding", embedding, (1, 2, 3, 4, 8, 32)),
            ("activations", activation, (1, 2, 4, 8, 32)),
        ):
            if value not in allowed:
                raise ValueError(f"config field `bits`: {name} must have one of {allowed} bits, found {self.bits!r}")
        if weight == 32 and activation != 32:
            raise ValueError(
                f"config field `bits`: quantized activations need quantized weights, found {self.bits!r}; "
                "use 32 bits for both or fewer for the weights"
            )
        if activation < 4 and self.activation_quantizer != "lsq":
            raise ValueError(
                f"config field `activation_quantizer` must be 'lsq' for {activation}-bit activations, found "
                f"{self.activation_quantizer!r}"
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name, low)
            if name == "head_dim" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"config field `{name}` must be a whole number in [{low}, {high}], found {value!r}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config field `hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), or `head_dim` be given"
            )
        if (self.planes == 2 or self.ternary_modules) and 1 not in (weight, embedding):
            raise ValueError(f"config fields `planes` and `ternary_modules` need binary weights, found {self.bits!r}")
        if self.planes == 2 and self.binary_quantizer != "bwn":
            raise ValueError("config field `binary_quantizer` must be 'bwn' with 2 planes: splitting is made for it")
        if self.split_modules is not None and self.planes == 1:
            raise ValueError("config field `split_modules` needs `planes` to be 2")
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        parameters = self.num_hidden_layers * layer + self.vocab_size * self.hidden_size
        if parameters > _MAX_PARAMETERS:
            raise ValueError(
                f"config describes {parameters:,} weights (num_hidden_layers {self.num_hidden_layers}, hidden_size "
                f"{self.hidden_size}, vocab_size {self.vocab_size}); at most {_MAX_PARAMETERS:,} are accepted"
            )
        if getattr(self, "transformers_weights", None) is not None:
            raise ValueError("config field `transformers_weights` is not accepted: it names a file to load instead")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"config field `hidden_act` must be one of {sorted(ACT2FN)}, found {self.hidden_act!r}")
        if self.chunk_size_feed_forward:
            raise ValueError(
                "config field `chunk_size_feed_forward` must be 0 (a chunk would have activation ranges of its own), "
                f"found {self.chunk_size_feed_forward!r}"
            )
        if self.layer_norm_eps <= 0 or self.layer_norm_eps > 1:
            raise ValueError(f"config field `layer_norm_eps` must be in (0, 1], found {self.layer_norm_eps!r}")
        known = {"quantization_config", *type(self).__dataclass_fields__}
        unknown = sorted(key for key in self.__dict__ if _LOW_BIT_WORD.search(key) and key not in known)
        unknown = [key for key in unknown if not key.startswith("_")]
        if unknown:
            known = sorted(low_bit_fields(type(self)))
            raise ValueError(f"config has unknown quantization fields {unknown}; known are {known}")

    @property
    def output_attentions(self):
        """As in `PreTrainedConfig`; quantized attention returns its probabilities, too."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool):
        if value and self._attn_implementation in ("qbert", "qbert_scores"):
            self._output_attentions = value
        else:
            PreTrainedConfig.output_attentions.fset(self, value)

    def validate_output_attentions(self):
        """As in `PreTrainedConfig`, of an attention that does not return its probabilities."""
        if self._attn_implementation not in ("qbert", "qbert_scores"):
            super().validate_output_attentions()

    @property
    def bit_widths(self) -> tuple[int, int, int]:
        """(weights, word embedding, activations)."""
        return _bit_widths(self.bits)

    def weight_spec(self, module: str) -> WeightSpec | None:
        """Quantizer of a linear layer by its name in the backbone, None in full precision."""
        return self._spec(module, self.bit_widths[0], self.weight_granularity)

    def embedding_spec(self, module: str) -> WeightSpec | None:
        """Quantizer of the word embedding by its name in the backbone, None in full precision."""
        spec = self._spec(module, self.bit_widths[1], self.embedding_granularity)
        if spec is None or spec.bits > 1 or spec.planes > 1 or spec.granularity == "per_tensor":
            return spec
        return replace(spec, short_scale=True)  # of a row of 768 bits a scale of 32 is 4 %; planes add up exactly

    @property
    def position_spec(self) -> WeightSpec | None:
        """Quantizer of the position embedding, None in full precision."""
        return WeightSpec("int8", "per_row", self.group_size) if self.position_bits == 8 else None

    @property
    def activation_quantizer_spec(self) -> ActivationQuantizer | None:
        """Quantizer of linear inputs and attention factors that has no state; None in full precision, and with learned
        step sizes, which belong to their modules (see `LowBitMixin`)."""
        return _activation_quantizer(self.bits, self.activation_quantizer, self.activation_granularity)

    def _spec(self, module: str, bits: int, granularity: str) -> WeightSpec | None:
        if bits == 32:
            return None
        if bits == 1 and module in (self.ternary_modules or ()):
            bits = 2
        split = bits == 1 and self.planes == 2 and (self.split_modules is None or module in self.split_modules)
        quantizer = {1: self.binary_quantizer, 2: self.weight_quantizer}.get(bits, f"int{bits}")
        return WeightSpec(quantizer, granularity, self.group_size, 2 if split else 1)

    def compute_fields(self) -> dict[str, Any]:
        """Every field that an answer depends on; a packed file carries them and refuses a config that differs."""
        names = {*low_bit_fields(type(self)), *_RANGES, "hidden_act", "layer_norm_eps", "pad_token_id", "is_decoder"}
        names |= {name for name in vars(self) if name.startswith("summary_") and "dropout" not in name}
        fields = {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}
        for name in _YOUNGER_FIELDS:
            if fields[name] == getattr(type(self), name):
                del fields[name]
        return {"model_type": self.model_type, **fields}


@lru_cache
def _bit_widths(bits: str) -> tuple[int, int, int]:
    if not isinstance(bits, str) or not re.fullmatch(r"\d{1,2}-\d{1,2}-\d{1,2}", bits):
        raise ValueError(f"config field `bits` must be W-E-A like '2-2-8', found {bits!r}")
    weight, embedding, activation = (int(part) for part in bits.split("-"))
    return weight, embedding, activation


@lru_cache
def _activation_quantizer(bits: str, quantizer: str, granularity: str) -> ActivationQuantizer | None:
    """Cached: every attention layer asks for it in every forward pass."""
    activation_bits = _bit_widths(bits)[2]
    if activation_bits == 32 or quantizer == "lsq":
        return None
    return ActivationQuantizer(activation_bits, quantizer != "asymmetric", granularity == "per_tensor")


def low_bit_fields(config_class: type[LowBitConfig] = LowBitConfig) -> list[str]:
    """Names of the fields that a low-bit config adds to its backbone's."""
    mixins = [base for base in reversed(config_class.__mro__) if issubclass(base, LowBitConfig)]
    return list(dict.fromkeys(name for base in mixins for name in base.__annotations__))


@strict
class TernaryBertConfig(LowBitConfig, BertConfig):
    __doc__ = "BERT with ternary weights (TernaryBERT). Adds to `BertConfig`:\n" + (LowBitConfig.__doc__ or "")
    model_type = "ternary_bert"


@strict
class TernaryRobertaConfig(LowBitConfig, RobertaConfig):
    __doc__ = "RoBERTa with ternary weights. Adds to `RobertaConfig`:\n" + (LowBitConfig.__doc__ or "")
    model_type = "ternary_roberta"


@strict
class TernaryElectraConfig(LowBitConfig, ElectraConfig):
    __doc__ = "ELECTRA with ternary weights. Adds to `ElectraConfig`:\n" + (LowBitConfig.__doc__ or "")
    model_type = "ternary_electra"


@strict
class BinaryBertConfig(LowBitConfig, BertConfig):
    __doc__ = "BERT with binary weights (BinaryBERT). Adds to `BertConfig`:\n" + (LowBitConfig.__doc__ or "")
    model_type = "binary_bert"
    bits: str = "1-1-8"


@strict
class BinaryRobertaConfig(LowBitConfig, RobertaConfig):
    __doc__ = "RoBERTa with binary weights. Adds to `RobertaConfig`:\n" + (LowBitConfig.__doc__ or "")
    model_type = "binary_roberta"
    bits: str = "1-1-8"


@strict
class BinaryElectraConfig(LowBitConfig, ElectraConfig):
    __doc__ = "ELECTRA with binary weights. Adds to `ElectraConfig`:\n" + (LowBitConfig.__doc__ or "")
    model_type = "binary_electra"
    bits: str = "1-1-8"


@strict
class GhostFields(LowBitConfig):
    r"""
    Fields of ghost features. Adds to `LowBitConfig`:

    Args:
        ghost_placement (`"both"`, `"attention"`, `"feed_forward"` or `"none"`, *optional*, defaults to `"both"`):
            The outputs in every layer that get ghost features.
        ghost_features (`int`, *optional*): Their number after the attention. Default: as many as heads were pruned,
            `hidden_size / head_dim - num_attention_heads`. The feed-forward output gets one.
        ghost_kernel_size (`int`, *optional*, defaults to 3): Tokens that a kernel spans, an odd number.
        ghost_normalization (`"softmax"` or `"none"`, *optional*, defaults to `"softmax"`): Of each kernel.
        ghost_activation (`str`, *optional*, defaults to `"relu"`): Non-linearity after the convolution.
    """

    bits: str = "32-32-32"
    ghost_placement: Literal["both", "attention", "feed_forward", "none"] = "both"
    ghost_features: int | None = None
    ghost_kernel_size: int = 3
    ghost_normalization: Literal["softmax", "none"] = "softmax"
    ghost_activation: str = "relu"

    def validate_ghosts(self):
        """Run by `@strict`; every error names the field and its value."""
        size, features = self.ghost_kernel_size, self.ghost_features
        if isinstance(size, bool) or size % 2 == 0 or not 1 <= size <= 63:
            raise ValueError(f"config field `ghost_kernel_size` must be an odd number in [1, 63], found {size!r}")
        if features is not None and (isinstance(features, bool) or not 0 <= features <= 1024):
            raise ValueError(f"config field `ghost_features` must be a whole number in [0, 1024], found {features!r}")
        if self.ghost_activation not in ACT2FN:
            raise ValueError(
                f"config field `ghost_activation` must be one of {sorted(ACT2FN)}, found {self.ghost_activation!r}"
            )
        if self.ghost_placement != "none" and self.is_decoder:
            raise ValueError("config field `is_decoder` must be False: ghost features see the next token")

    @property
    def attention_ghosts(self) -> int:
        """Ghost features after the attention of each layer."""
        if self.ghost_placement not in ("both", "attention"):
            return 0
        if self.ghost_features is not None or self.head_dim is None:
            return self.ghost_features or 0
        return max(0, self.hidden_size // self.head_dim - self.num_attention_heads)

    @property
    def feed_forward_ghosts(self) -> int:
        """Ghost features after the feed-forward network of each layer."""
        return 1 if self.ghost_placement in ("both", "feed_forward") else 0


@strict
class GhostBertConfig(GhostFields, BertConfig):
    __doc__ = "BERT with ghost features (GhostBERT). Adds to `BertConfig`:\n" + (GhostFields.__doc__ or "")
    model_type = "ghost_bert"


@strict
class GhostRobertaConfig(GhostFields, RobertaConfig):
    __doc__ = "RoBERTa with ghost features. Adds to `RobertaConfig`:\n" + (GhostFields.__doc__ or "")
    model_type = "ghost_roberta"


@strict
class GhostElectraConfig(GhostFields, ElectraConfig):
    __doc__ = "ELECTRA with ghost features. Adds to `ElectraConfig`:\n" + (GhostFields.__doc__ or "")
    model_type = "ghost_electra"
