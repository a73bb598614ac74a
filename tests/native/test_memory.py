"""Bits that the engine alone holds: whoever looks sees them, and what is done to them shows in the answers."""

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn


sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "modeling"))

from tiny import inputs, latent  # noqa: E402

from modeling_qbert.layers import PackedLinear  # noqa: E402


LAYOUTS = {
    "2bit": ({"family": "ternary"}, "2bit"),
    "dense": ({"family": "ternary"}, "dense"),
    "1bit": ({"family": "binary", "bits": "1-1-8"}, "2bit"),
    "1bit, two planes": ({"family": "binary", "bits": "1-1-8", "planes": 2}, "2bit"),
    "1bit, some in two planes": (
        {"family": "binary", "bits": "1-1-8", "planes": 2, "split_modules": ["encoder.layer.0.attention.self.key"]},
        "2bit",
    ),
    "int8": ({"family": "ternary", "bits": "8-8-8"}, "2bit"),
}


def packed(layout: str = "2bit") -> nn.Module:
    fields, packing = LAYOUTS[layout]
    return latent("bert", "base", **fields).pack(packing)


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return model(**inputs())[0]


def encoder_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.encoder.named_modules() if isinstance(module, PackedLinear)}


def lent(model: nn.Module) -> list[str]:
    """Layers whose bits no tensor holds."""
    return [
        name
        for name, layer in encoder_layers(model).items()
        if dict.__getitem__(layer._buffers, "weight").device.type == "meta"
    ]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.clone() for name, layer in encoder_layers(model).items()}


def assert_bits(layers: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert layers.keys() == expected.keys()
    for name, tensor in expected.items():
        assert layers[name].dtype == torch.uint8 and torch.equal(layers[name], tensor), name


def of_each_layer(look) -> Any:
    return lambda model: {name: look(layer) for name, layer in encoder_layers(model).items()}


def encoder_bits(tensors) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("encoder.").removesuffix(".weight"): tensor
        for name, tensor in tensors
        if name.startswith("encoder.") and tensor.dtype == torch.uint8
    }


LOOKS = {
    "attribute": of_each_layer(lambda layer: layer.weight),
    "state_dict": lambda model: encoder_bits(model.state_dict().items()),
    "named_buffers": lambda model: encoder_bits(model.named_buffers()),
    "get_buffer": of_each_layer(lambda layer: layer.get_buffer("weight")),
    "get": of_each_layer(lambda layer: layer._buffers.get("weight")),
    "values": of_each_layer(lambda layer: next(iter(layer._buffers.values()))),
    "dict": of_each_layer(lambda layer: dict(layer._buffers)["weight"]),
    "unpacked dict": of_each_layer(lambda layer: {**layer._buffers}["weight"]),
    "joined dicts": of_each_layer(lambda layer: ({} | layer._buffers)["weight"]),
    "copied dict": of_each_layer(lambda layer: layer._buffers.copy()["weight"]),
    "pickled dict": of_each_layer(lambda layer: pickle.loads(pickle.dumps(layer._buffers))["weight"]),
    "pop": of_each_layer(lambda layer: layer._buffers.pop("weight")),
    "shallow copy": of_each_layer(lambda layer: copy.copy(layer).weight),
    "deep copy": lambda model: bits(copy.deepcopy(model)),
    "pickle": lambda model: bits(pickle.loads(pickle.dumps(model))),
    "cast": lambda model: bits(model.double()),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whoever_looks_sees_the_bits(layout, look):
    model = packed(layout)
    before = bits(model)
    answer(model)
    assert lent(model) == list(before)
    assert_bits(LOOKS[look](model), before)


def test_saved_and_opened_again(tmp_path):
    model = packed()
    expected = answer(model)
    assert lent(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path)), expected)


def test_a_look_does_not_make_the_engine_again_and_a_write_does():
    model = packed()
    expected, engine = answer(model), weakref.ref(model._fused_engine)
    bits(model)
    assert not lent(model)
    assert torch.equal(answer(model), expected) and model._fused_engine is engine()
    name, layer = next(iter(encoder_layers(model).items()))
    before = bits(model)
    layer.weight.copy_(before[name].flip(0))
    changed = answer(model)
    assert not torch.equal(changed, expected) and engine() is None
    assert len(lent(model)) == len(before)
    assert torch.equal(layer.weight, before[name].flip(0))
    layer.weight = before[name]  # while lent again
    assert torch.equal(answer(model), expected)


def test_replaced_while_lent():
    model, other = packed(), packed()
    answer(model)
    layer, twin = (next(iter(encoder_layers(each).values())) for each in (model, other))
    flipped = twin.weight.flip(0)
    layer.weight = flipped
    twin.weight.copy_(flipped)
    assert torch.equal(layer.weight, flipped)
    assert torch.equal(answer(model), answer(other))
    model.load_state_dict(packed().state_dict())
    assert torch.equal(answer(model), answer(packed()))


def test_an_engine_made_again_while_lent():
    model, other = packed(), packed()
    answer(model)
    for each in (model, other):
        with torch.no_grad():
            each.encoder.layer[0].output.LayerNorm.weight.mul_(1.5)
    expected = answer(other)
    assert lent(model)
    assert torch.equal(answer(model), expected)
    assert lent(model) == list(encoder_layers(model))
    for each in (model, other):
        layer = each.encoder.layer[1].output.dense
        layer.weight = layer.weight.flip(0)
    changed = answer(model)
    assert not torch.equal(changed, expected) and torch.equal(changed, answer(other))


HOLDS = {
    "tensor": lambda layer: layer.weight,
    "view": lambda layer: layer.weight[:1],
    "array": lambda layer: layer.weight.numpy(),
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "weak view": lambda layer: layer.weight.detach(),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_what_someone_else_holds_is_not_lent(hold):
    """A write to it must go on to show."""
    model = packed()
    name, layer = next(iter(encoder_layers(model).items()))
    held = HOLDS[hold](layer)
    address = layer.weight.data_ptr()
    before = answer(model)
    assert name not in lent(model) and lent(model)
    assert layer.weight.data_ptr() == address
    held[0] = 0b01010101  # zeros
    assert torch.equal(layer.weight[0], torch.full_like(layer.weight[0], 0b01010101))
    if hold not in ("array", "state_dict", "weak view"):  # torch counts no writes of those
        assert not torch.equal(answer(model), before)


def test_memory_is_free_and_comes_back():
    model = packed()
    sizes = [layer.weight.untyped_storage().nbytes() for layer in encoder_layers(model).values()]
    own = set(sizes) - {model.pooler.dense.weight.untyped_storage().nbytes()}
    assert own
    answer(model)
    gc.collect()
    held = [
        tensor
        for tensor in gc.get_objects()
        if type(tensor) is torch.Tensor and tensor.dtype == torch.uint8 and tensor.device.type == "cpu"
    ]
    assert not {tensor.untyped_storage().nbytes() for tensor in held} & own
    assert [layer.weight.untyped_storage().nbytes() for layer in encoder_layers(model).values()] == sizes


def test_inference_mode_and_device_contexts():
    model = packed()
    before = bits(model)
    with torch.inference_mode():
        model(**inputs())
        assert lent(model)
        looked = model.state_dict()
    assert not any(tensor.is_inference() for tensor in looked.values())
    answer(model)
    model = packed()
    answer(model)
    with torch.device("meta"):
        found = {name: layer.weight for name, layer in encoder_layers(model).items()}
    assert_bits(found, before)


def test_many_threads_look_at_once():
    model = packed()
    before = bits(model)
    for _ in range(20):
        model.encoder.layer[0].output.dense.weight_scale.mul_(1)  # a write: lent again
        answer(model)
        assert lent(model)
        look_together(model, before)


def look_together(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    start, found = threading.Barrier(8), []

    def look() -> None:
        start.wait()
        found.append({name: layer.weight for name, layer in encoder_layers(model).items()})

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for each in found:
        assert_bits(each, expected)


def test_layer_by_layer_and_compiled_after_the_engine():
    model = packed()
    expected, given = answer(model), inputs()
    with torch.no_grad():
        hidden = model(**given, output_hidden_states=True)
    real = given["attention_mask"].bool()
    assert torch.equal(hidden.last_hidden_state[real], expected[real])
    compiled = packed()
    answer(compiled)
    assert lent(compiled)
    with torch.no_grad():
        traced = torch.compile(compiled, backend="aot_eager", fullgraph=True)(**given)[0]
    torch.testing.assert_close(traced[real], expected[real], atol=1e-6, rtol=1e-6)
    answer(compiled)
    exported = torch.export.export(packed_after_answer(), (), given)
    torch.testing.assert_close(exported.module()(**given)[0][real], expected[real], atol=1e-6, rtol=1e-6)


def packed_after_answer() -> nn.Module:
    model = packed()
    answer(model)
    assert lent(model)
    return model


def test_an_engine_that_is_gone_still_gives_back():
    model = packed()
    before = bits(model)
    answer(model)
    layers = encoder_layers(model)
    del model
    gc.collect()
    assert_bits({name: layer.weight for name, layer in layers.items()}, before)


def test_memory_that_runs_out_leaves_the_bits_with_the_engine(monkeypatch):
    model = packed()
    before = bits(model)
    answer(model)
    layer = next(iter(encoder_layers(model).values()))
    take_back = layer._buffers.take_back

    def fail() -> torch.Tensor:
        raise MemoryError("the native engine ran out of memory")

    monkeypatch.setattr(layer._buffers, "take_back", fail)
    with pytest.raises(MemoryError):
        layer.weight  # noqa: B018
    layer._buffers.take_back = take_back
    assert_bits(bits(model), before)
