"""Packed against fake-quant: the same codes, scales and logits, whatever the settings and whatever comes after."""

import copy
import itertools
import json
import pickle
import random

import pytest
import torch
from tiny import (
    BACKBONE_SIZES,
    EVERY_HEAD,
    answers,
    assert_same_codes,
    config,
    inputs,
    latent,
    quantized_layers,
    randomize,
    read_parts,
)
from transformers import AutoConfig, AutoModel

from modeling_qbert import CheckpointError, get_model_class, verify_checkpoint
from modeling_qbert.integration import _HEADS as AUTO_CLASSES
from modeling_qbert.layers import PackedEmbedding, PackedLinear
from modeling_qbert.modeling_ternary import HEADS
from modeling_qbert.packing import PACKINGS
from modeling_qbert.quantizers import GRANULARITIES, WEIGHT_QUANTIZERS, LsqQuantizer


TERNARY = [name for name, (bits, _) in WEIGHT_QUANTIZERS.items() if bits == 2]
BITS = ["2-2-8", "2-2-4", "2-8-8", "8-2-4", "8-8-8", "2-2-32", "2-32-8", "32-2-32", "32-8-32", "8-32-32"]
EVERY_SETTING = [
    {
        "bits": bits,
        "weight_quantizer": quantizer,
        "weight_granularity": weight,
        "embedding_granularity": embedding,
        "activation_quantizer": activation,
        "activation_granularity": over,
    }
    for bits, quantizer, weight, embedding, activation, over in itertools.product(
        BITS, TERNARY, GRANULARITIES, GRANULARITIES, ("symmetric", "asymmetric"), ("per_token", "per_tensor")
    )
    if not (bits.endswith("32") and (activation, over) != ("symmetric", "per_token"))  # activations off: one is enough
]
SIZES = [
    {},
    {"hidden_size": 20, "num_attention_heads": 4, "intermediate_size": 33, "vocab_size": 101, "num_hidden_layers": 1},
    {"hidden_size": 15, "num_attention_heads": 1, "intermediate_size": 1, "vocab_size": 98, "group_size": 64},
    {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 128, "group_size": 1},
    {"hidden_size": 30, "num_attention_heads": 5, "intermediate_size": 31, "vocab_size": 97, "num_hidden_layers": 0},
]


@pytest.mark.parametrize("bits", BITS)
def test_every_setting(bits):
    given = inputs()
    for number, setting in enumerate(s for s in EVERY_SETTING if s["bits"] == bits):
        model = latent(head="base", seed=number, num_hidden_layers=1, **setting)
        packed = model.pack(PACKINGS[number % 2])
        assert_same_codes(model, packed)
        assert torch.equal(answers(packed, given), answers(model, given)), setting


@pytest.mark.parametrize("setting", random.Random(0).sample(EVERY_SETTING, 24), ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("packing", PACKINGS)
def test_settings_survive_a_file(setting, packing, tmp_path):
    model = latent(seed=1, **setting)
    given, expected = inputs(), answers(model, inputs())
    model.pack(packing).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_codes(model, loaded)
    assert torch.equal(answers(loaded, given), expected)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
@pytest.mark.parametrize("family", ["ternary", "binary"])
def test_every_head_through_a_file_and_auto_classes(family, backbone, head, packing, tmp_path):
    model = latent(backbone, head, family=family, **({"planes": 2} if family == "binary" else {}))
    given, expected = inputs(head), answers(model, inputs(head))
    packed = model.pack(packing)
    assert packed.is_packed and not model.is_packed
    assert torch.equal(answers(packed, given), expected)
    packed.save_pretrained(tmp_path / "one")
    loaded, info = AUTO_CLASSES[head][1].from_pretrained(tmp_path / "one", output_loading_info=True)
    assert type(loaded) is type(model) and loaded.is_packed
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_codes(model, loaded)
    assert torch.equal(answers(loaded, given), expected)
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())) or "odd")
@pytest.mark.parametrize("backbone", HEADS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_odd_shapes(backbone, sizes, granularity, tmp_path):
    fields = {**sizes, "weight_granularity": granularity, "embedding_granularity": granularity}
    model = latent(backbone, **fields)
    given, expected = inputs(), answers(model, inputs())
    for packing in PACKINGS:
        packed = model.pack(packing)
        assert torch.equal(answers(packed, given), expected)
        packed.save_pretrained(tmp_path / packing)
        assert torch.equal(answers(type(model).from_pretrained(tmp_path / packing), given), expected)


@pytest.mark.parametrize("backbone", HEADS)
def test_the_packed_layers_are_the_papers(backbone):
    """Word embedding, every linear layer of the encoder, and the pooler; nothing else."""
    packed = latent(backbone).pack()
    layers = packed.config.num_hidden_layers
    kinds = [type(layer) for layer in quantized_layers(packed).values()]
    assert kinds.count(PackedEmbedding) == 1 and kinds.count(PackedLinear) == 6 * layers + 1
    floats = {name for name, tensor in packed.state_dict().items() if tensor.dtype == torch.float32}
    assert any("position_embeddings" in name for name in floats)
    assert all(
        name.endswith(("weight_scale", "bias", "LayerNorm.weight"))
        or "position_embeddings" in name
        or "token_type_embeddings" in name
        or "embeddings_project" in name
        or name.startswith("classifier.")
        for name in floats
    )


@pytest.fixture(scope="module")
def example():
    model = latent(weight_granularity="per_row")
    return model, inputs(), answers(model, inputs())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.pack("dense"),
        lambda model: model.pack("dense").pack("2bit"),
    ],
    ids=["deepcopy", "pickle", "dense", "dense-2bit"],
)
def test_copies_answer_the_same(example, copied, tmp_path):
    model, given, expected = example
    packed = model.pack()
    answers(packed, given)
    other = copied(packed)
    assert other is not packed and other.is_packed
    assert_same_codes(model, other)
    assert torch.equal(answers(other, given), expected)
    packed.save_pretrained(tmp_path / "one")
    other.pack("2bit").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    for tensor in other.state_dict().values():  # the copy owns its memory
        tensor.zero_()
    assert torch.equal(answers(packed, given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_codes_and_scales_alone(example, dtype, tmp_path):
    model, given, expected = example
    packed = model.pack()
    answers(packed, given)
    packed.to(dtype)
    assert_same_codes(model, packed)
    for layer in quantized_layers(packed).values():
        assert layer.weight.dtype == torch.uint8 and layer.weight_scale.dtype == torch.float32
    assert packed.dtype == dtype and packed.bert.embeddings.position_embeddings.weight.dtype == dtype
    close = answers(packed, given).float()
    torch.testing.assert_close(close, expected, atol=0.5, rtol=0.2)
    if dtype != torch.float64:
        packed.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.dtype == dtype and torch.equal(answers(loaded, given).float(), close)
    else:
        with pytest.raises(ValueError, match="float64"):
            packed.save_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["half", "bfloat16", "double"])
def test_cast_methods(example, method):
    model, given, expected = example
    packed = model.pack()
    try:
        getattr(packed, method)()
    except ValueError:  # Transformers refuses some on quantized models: refused is as good as harmless
        pass
    assert_same_codes(model, packed)
    torch.testing.assert_close(answers(packed, given).float(), expected, atol=0.5, rtol=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_type(example, dtype, tmp_path):
    model, given, expected = example
    model.pack().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert_same_codes(model, loaded)
    torch.testing.assert_close(answers(loaded, given).float(), expected, atol=0.5, rtol=0.2)


def test_state_dict_round_trip(example):
    model, given, expected = example
    packed, other = model.pack(), latent(seed=5, weight_granularity="per_row").pack()
    assert not torch.equal(answers(other, given), expected)
    other.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(answers(other, given), expected)


def test_latent_round_trip_keeps_loss_aware_scales(tmp_path):
    model = latent(weight_quantizer="lat")
    model.update_scales({name: torch.rand_like(p) for name, p in model.named_parameters()})
    expected = answers(model, inputs())
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_codes(model, loaded)
    assert torch.equal(answers(loaded, inputs()), expected)


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_dequantize_gives_the_plain_model(backbone, head, tmp_path):
    model = latent(backbone, head, bits="2-2-32")
    packed = model.pack("dense")
    plain = packed.dequantize()
    assert type(plain) in type(model).__mro__ and not hasattr(plain, "pack")
    assert plain.config.model_type == backbone and not hasattr(plain.config, "quantization_config")
    for name, layer in quantized_layers(model).items():
        quantized = layer.quantize_weight()
        scale = layer.spec and quantized.scale
        assert torch.equal(plain.get_submodule(name).weight, quantized.codes.float() * scale), name
    given = inputs(head)
    torch.testing.assert_close(answers(plain, given), answers(model, given), atol=1e-5, rtol=1e-4)
    for name, tensor in plain.state_dict().items():
        if name in model.state_dict() and name.removesuffix(".weight") not in quantized_layers(model):
            assert torch.equal(tensor, model.state_dict()[name]), name
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(answers(again, given), answers(plain, given))


def test_a_model_in_training_mode_packs_without_dropout_and_stays_in_training_mode(example):
    model, given, expected = example
    student = copy.deepcopy(model).train()
    packed = student.pack()
    assert student.training and not packed.training
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert torch.equal(answers(packed, given), expected)
    with torch.no_grad():
        student.bert.embeddings.LayerNorm.bias.add_(1)
        student.bert.encoder.layer[0].output.dense.weight.zero_()
    assert torch.equal(answers(packed, given), expected)  # the packed model owns its memory


def test_packing_is_refused_clearly(example):
    model, _, _ = example
    with pytest.raises(ValueError, match="3bit"):
        model.pack("3bit")
    with pytest.raises(ValueError, match="nothing to pack"):
        latent(bits="32-32-32").pack()


def test_only_the_main_process_saves(tmp_path):
    model = latent().pack()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("*.safetensors"))
    with pytest.raises(ValueError, match="variant: a packed checkpoint is one file model.safetensors, found 'fp16'"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant").exists()


@pytest.mark.parametrize("family", ["ternary", "binary", "ghost"])
@pytest.mark.parametrize("backbone", HEADS)
def test_the_backbone_alone_is_one_of_the_family(family, backbone, tmp_path):
    bits = "1-1-8" if family == "binary" else "2-2-8"
    whole, given = latent(backbone, "sequence-classification", family=family, bits=bits), inputs()
    for model in (whole, whole.pack()):
        folder = tmp_path / str(model.is_packed)
        model.save_pretrained(tmp_path / "whole")  # then the config names a head
        model.base_model.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        (architecture,) = fields["architectures"]
        assert architecture == get_model_class(family, backbone, "base").__name__
        for place in fields["auto_map"].values():
            assert (folder / f"{place.split('.')[0]}.py").is_file()
        if model.is_packed:
            verify_checkpoint(folder)
        without = {"add_pooling_layer": False} if model.is_packed and backbone == "roberta" else {}
        if without:
            with pytest.raises(CheckpointError, match="has no pooler: load with add_pooling_layer=False"):
                AutoModel.from_pretrained(folder)
        found = AutoModel.from_pretrained(folder, **without)
        assert type(found).__name__ == architecture and found.is_packed == model.is_packed
        with torch.no_grad():  # a pooler that was not there is new
            assert torch.equal(found(**given)[0], model.base_model(**given)[0])


def test_a_step_that_fell_below_zero_packs_as_it_computes():
    """`DistillationTrainer` holds steps above 0, a plain Trainer does not."""
    model, given = latent(family="binary", bits="1-1-4", activation_quantizer="lsq"), inputs()
    steps = [module.step for module in model.modules() if isinstance(module, LsqQuantizer)]
    for step in steps[::3]:
        step.data.neg_()
    packed = model.pack()
    assert torch.equal(answers(packed, given), answers(model, given))
    assert all(float(module.step) > 0 for module in packed.modules() if isinstance(module, LsqQuantizer))


def test_weights_that_are_not_numbers_are_not_saved(example, tmp_path):
    model, _, _ = example
    for name in ("classifier.bias", "bert.encoder.layer.1.output.dense.weight"):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=name):
            broken.pack().save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))


def test_every_packed_layer_is_in_the_header(example, tmp_path):
    model, _, _ = example
    model.pack().save_pretrained(tmp_path)
    header, data = read_parts(tmp_path / "model.safetensors")
    names = {f"{name}.{leaf}" for name in quantized_layers(model) for leaf in ("weight", "weight_scale")}
    assert names <= set(header)
    assert {header[name]["dtype"] for name in names if name.endswith(".weight")} == {"U8"}
    assert len(data) == max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize("backbone", HEADS)
def test_auto_config_knows_every_family(backbone, tmp_path):
    fields = config(backbone, bits="2-8-4", weight_quantizer="lat")
    fields.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(fields) and loaded.to_diff_dict() == fields.to_diff_dict()
    assert loaded.bit_widths == (2, 8, 4)


@pytest.mark.parametrize("backbone", HEADS)
def test_another_head_starts_from_a_packed_backbone(backbone, tmp_path):
    model = latent(backbone, "token-classification").pack()
    model.save_pretrained(tmp_path)
    given = inputs()
    loaded, info = get_model_class("ternary", backbone, "question-answering").from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"qa_outputs"}
    base_class = get_model_class("ternary", backbone, "base")
    if backbone == "electra":
        base = base_class.from_pretrained(tmp_path)
    else:  # a packed pooler that the file lacks could only be filled with invented codes
        with pytest.raises(CheckpointError, match=r"pooler.*add_pooling_layer=False"):
            base_class.from_pretrained(tmp_path)
        base = base_class.from_pretrained(tmp_path, add_pooling_layer=False)
    with pytest.raises(CheckpointError, match="was saved with config field 'num_labels'"):
        type(model).from_pretrained(tmp_path, num_labels=5)
    with torch.no_grad():
        hidden = model.base_model(**given)[0]
        assert torch.equal(loaded.base_model(**given)[0], hidden) and torch.equal(base(**given)[0], hidden)


def test_embedding_sizes_are_tried(backbone="electra"):
    assert BACKBONE_SIZES[backbone]["embedding_size"] != config(backbone).hidden_size
    assert hasattr(randomize(get_model_class("ternary", backbone, "base")(config(backbone))), "embeddings_project")
