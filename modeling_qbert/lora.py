"""LoRA through peft on quantized linear layers: `get_peft_model` and `add_adapter` as on any other model.

The adapter adds its product in full precision to what the quantized layer answers; gradients pass that layer straight
through. peft has no public registry of layers, so its factory of LoRA layers is wrapped here: for quantized layers it
calls `LoraConfig._register_custom_module` first.
"""

from torch import nn

from .layers import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear


try:
    from peft.tuners.lora import Linear as _LoraLinear
    from peft.tuners.lora import LoraModel
except ImportError:  # without peft nobody attaches adapters
    _LoraLinear = LoraModel = None


if _LoraLinear is not None:

    class LoraQuantizedLinear(_LoraLinear):
        """LoRA beside a `PackedLinear` or `QuantLinear`, which stays as it is."""

        lora_variants = {(): None}  # DoRA and other variants read or change the float weight

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return module.in_features, module.out_features

        def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
            if config.init_lora_weights not in (True, False, "gaussian"):
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights!r} computes with the layer's weight; on quantized "
                    "layers use True, False or 'gaussian'"
                )
            try:
                self.resolve_lora_variant(config=config)
            except ValueError as error:
                raise ValueError(f"quantized layers take plain LoRA, no variant of it ({error})") from None
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
            raise ValueError(
                "LoRA cannot be merged into quantized weights: rounding to codes would lose it. Keep the adapter "
                "beside the model; or load it on the full-precision copy that `dequantize()` makes and merge there, "
                "where activations are no longer quantized"
            )

    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(layer, PackedEmbedding | QuantEmbedding):
            raise ValueError(
                f"LoRA on {type(layer).__name__} is not supported: leave embeddings out of target_modules"
            )
        if isinstance(layer, PackedLinear | QuantLinear):
            lora_config._register_custom_module({type(layer): LoraQuantizedLinear})
        return _create_any_module(lora_config, adapter_name, target, **kwargs)

    _create_any_module = LoraModel._create_new_module
    LoraModel._create_new_module = staticmethod(_create_new_module)


def refuse_adapters(model: nn.Module, action: str) -> None:
    """Clear error for a model that holds adapters of peft, which `action` would drop or misname."""
    wrapped = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped} holds an adapter; to {action} the model, save the adapter with peft's save_pretrained and "
            "take it off with unload() first"
        )
