"""The LoRA layer of quantized linear layers. Importing this module imports peft; `lora` does so once peft is there."""

import importlib

from torch import nn


Linear = importlib.import_module("peft.tuners.lora.layer").Linear  # no import statement: remote code would require it


class LoraQuantizedLinear(Linear):
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
