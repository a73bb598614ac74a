"""LoRA through peft on quantized linear layers: `get_peft_model` and `add_adapter` as on any other model.

The adapter adds its product in full precision to what the quantized layer answers; gradients pass that layer straight
through. peft has no public registry of layers, so its factory of LoRA layers is wrapped here: for quantized layers it
calls `LoraConfig._register_custom_module` first. That happens when somebody imports peft, before or after this
package: its 11 MB are not spent on models without adapters.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import nn

from .layers import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear


_FACTORY = "peft.tuners.lora.model"  # the module of LoraModel


def _teach(peft_module: ModuleType) -> None:
    from .lora_layer import LoraQuantizedLinear

    lora_model = peft_module.LoraModel
    create_any_module = lora_model._create_new_module

    def create_new_module(lora_config, adapter_name, target, **kwargs):
        layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(layer, PackedEmbedding | QuantEmbedding):
            raise ValueError(
                f"LoRA on {type(layer).__name__} is not supported: leave embeddings out of target_modules"
            )
        if isinstance(layer, PackedLinear | QuantLinear):
            lora_config._register_custom_module({type(layer): LoraQuantizedLinear})
        return create_any_module(lora_config, adapter_name, target, **kwargs)

    lora_model._create_new_module = staticmethod(create_new_module)


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Has the factory taught right after its module has run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if name != _FACTORY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_teach(module: ModuleType) -> None:
                run(module)
                _teach(module)

            spec.loader.exec_module = run_and_teach
        return spec


if _FACTORY in sys.modules:
    _teach(sys.modules[_FACTORY])
else:
    sys.meta_path.insert(0, _AfterPeft())


def refuse_adapters(model: nn.Module, action: str) -> None:
    """Clear error for a model that holds adapters of peft, which `action` would drop or misname."""
    wrapped = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped} holds an adapter; to {action} the model, save the adapter with peft's save_pretrained and "
            "take it off with unload() first"
        )
