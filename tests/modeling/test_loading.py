"""From plain checkpoints to latent models, masked-LM heads, loss-aware scales, and clear refusals."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tiny import BACKBONE_SIZES, EVERY_HEAD, ODD, answers, assert_same_codes, config, inputs, latent, randomize
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from modeling_qbert import CheckpointError, get_model_class
from modeling_qbert.layers import PackedLinear, QuantEmbedding, QuantLinear
from modeling_qbert.modeling_ternary import HEADS
from modeling_qbert.ops import dequantize_weight
from modeling_qbert.packing import PACKINGS


def plain(backbone, head):
    """The Transformers model that a low-bit class is made of, with its plain config."""
    low_bit = get_model_class("ternary", backbone, head)
    original = next(base for base in low_bit.__mro__ if base.__module__.startswith("transformers."))
    sizes = {name: value for name, value in ODD.items() if name != "group_size"}
    return randomize(original(original.config_class(**sizes, **BACKBONE_SIZES.get(backbone, {}))))


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_every_plain_checkpoint_loads_whole(backbone, head, tmp_path):
    original = plain(backbone, head)
    original.save_pretrained(tmp_path)
    low_bit = get_model_class("ternary", backbone, head)
    given, expected = inputs(head), answers(original, inputs(head))
    model, info = low_bit.from_pretrained(tmp_path, bits="32-32-32", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert torch.equal(answers(model, given), expected)  # quantization off: the original, bit for bit
    for fields in ({}, {"weight_quantizer": "lat", "weight_granularity": "per_group", "bits": "2-8-4"}):
        model, info = low_bit.from_pretrained(tmp_path, **fields, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert not model.is_packed and {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in original.named_parameters()
        }
        for name, parameter in original.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name
        assert not torch.allclose(answers(model, given), expected, atol=1e-3)


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_full_precision_is_the_original(backbone, head):
    """Built from config and in training mode too: dropout and all."""
    original = plain(backbone, head)
    model = get_model_class("ternary", backbone, head)(config(backbone, bits="32-32-32"))
    model.load_state_dict(original.state_dict(), strict=True)
    given = inputs(head)
    for mode in (False, True):
        found = []
        for one in (original.train(mode), model.train(mode)):
            one.set_attn_implementation("eager")
            torch.manual_seed(1)
            found.append(answers(one, given))
        assert torch.equal(*found)


@pytest.mark.parametrize("backbone", HEADS)
def test_another_backbone_is_refused(backbone, tmp_path):
    plain(backbone, "sequence-classification").save_pretrained(tmp_path / "plain")
    latent(backbone).save_pretrained(tmp_path / "latent")
    latent(backbone).pack().save_pretrained(tmp_path / "packed")
    for other in set(HEADS) - {backbone}:
        for kind in ("plain", "latent", "packed"):
            with pytest.raises(CheckpointError, match=f"{kind}/config.json.*model_type"):
                get_model_class("ternary", other, "sequence-classification").from_pretrained(tmp_path / kind)


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_a_missing_backbone_tensor_is_refused(kind, tmp_path):
    model = plain("bert", "sequence-classification") if kind == "plain" else latent()
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    low_bit = get_model_class("ternary", "bert", "sequence-classification")
    for name in (
        "bert.encoder.layer.1.output.dense.weight",
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.LayerNorm.bias",
    ):
        save_file({key: value for key, value in whole.items() if key != name}, tmp_path / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        with pytest.raises(CheckpointError, match=name):
            low_bit.from_pretrained(tmp_path)
    save_file({"wrong." + key: value for key, value in whole.items()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(CheckpointError, match="missing"):
        low_bit.from_pretrained(tmp_path)


def test_a_backbone_without_a_head_gets_a_new_one(tmp_path):
    plain("bert", "base").save_pretrained(tmp_path)
    model, info = get_model_class("ternary", "bert", "sequence-classification").from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert model.config.num_labels == 5 and torch.isfinite(answers(model, inputs())).all()


def test_a_damaged_plain_checkpoint_names_its_folder(tmp_path):
    plain("bert", "base").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        get_model_class("ternary", "bert", "base").from_pretrained(tmp_path)


def test_packed_weights_are_not_taken_for_latent_ones(tmp_path):
    """8-bit codes have the shape of the weights: only the file says that they are codes."""
    latent(bits="8-8-8").pack().save_pretrained(tmp_path)
    fields = AutoConfig.from_pretrained(tmp_path)
    del fields.quantization_config
    fields.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quantization_config"):
        AutoModel.from_pretrained(tmp_path)


# Masked-LM heads


@pytest.mark.parametrize("bits", ["2-2-8", "8-8-8"])
def test_a_packed_file_never_loads_as_float_weights(bits, tmp_path):
    """Not even when config.json is edited into a plain BERT's: no packed tensor has the shape of its float weight."""
    latent(bits=bits).pack().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_row", "per_group"])
@pytest.mark.parametrize("backbone", HEADS)
def test_a_tied_decoder_has_no_weights_of_its_own(backbone, granularity, packing, tmp_path):
    model = latent(backbone, "masked-lm", embedding_granularity=granularity)
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(decoder) is QuantLinear and decoder.weight is embedding.weight
    given, expected = inputs(), answers(model, inputs())
    packed = model.pack(packing)
    packed.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith(("weight", "weight_scale"))]
    assert not [name for name in names if "decoder" in name or "generator_lm_head.weight" in name]
    for other in (packed, type(model).from_pretrained(tmp_path), copy.deepcopy(packed), packed.pack("2bit")):
        decoder, embedding = other.get_output_embeddings(), other.get_input_embeddings()
        assert type(decoder) is PackedLinear and decoder.source == (embedding,)
        assert torch.equal(answers(other, given), expected)
    value = dequantize_weight(embedding.quantize_weight(), embedding.spec.group_size)
    restored = packed.dequantize()
    assert torch.equal(restored.get_input_embeddings().weight, value)
    assert restored.get_output_embeddings().weight is restored.get_input_embeddings().weight


@pytest.mark.parametrize("backbone", HEADS)
def test_an_untied_decoder_stays_in_full_precision(backbone, tmp_path):
    model = latent(backbone, "masked-lm", tie_word_embeddings=False)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    given, expected = inputs(), answers(model, inputs())
    packed = model.pack()
    packed.save_pretrained(tmp_path)
    assert torch.equal(answers(type(model).from_pretrained(tmp_path), given), expected)


def test_resuming_a_tied_model_trains_one_matrix():
    model = latent("bert", "masked-lm").train()
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "decoder.weight" in name]
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


# Loss-aware scales


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row", "per_group"])
def test_second_moments_move_scales(granularity):
    fields = {"weight_granularity": granularity, "embedding_granularity": granularity}
    model = latent(weight_quantizer="lat", **fields)
    cold = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    moments = {name: torch.rand(p.shape, generator=generator) ** 8 for name, p in model.named_parameters()}
    for _ in range(20):
        model.update_scales(moments)
    smaller = 0
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear | QuantEmbedding):
            curvature = moments[f"{name}.weight"].sqrt()
            before, after = (
                (curvature * (dequantize_weight(m.quantize_weight(), 7) - layer.weight) ** 2).sum()
                for m in (cold.get_submodule(name), layer)
            )
            assert after <= before * (1 + 1e-6), name
            smaller += int(after < before * 0.999)
    assert smaller >= 3
    expected = answers(model, inputs())
    model.update_scales(None)  # nothing is cold: nothing moves
    assert torch.equal(answers(model, inputs()), expected)
    assert torch.equal(answers(model.pack(), inputs()), expected)
    flat = copy.deepcopy(cold)
    flat.update_scales({})  # no moments known: curvature 1
    assert_same_codes(flat, cold)


def test_scales_of_twn_follow_the_weights_alone():
    model = latent()
    expected = answers(model, inputs())
    model.update_scales({name: torch.rand_like(p) for name, p in model.named_parameters()})
    assert torch.equal(answers(model, inputs()), expected)
    assert not [name for name in model.state_dict() if "scale" in name]


# Configs


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"bits": "2-2"}, "bits"),
        ({"bits": "5-2-8"}, "weights must have one of"),
        ({"bits": "2-5-8"}, "embedding must have one of"),
        ({"bits": "2-2-3"}, "activations must have one of"),
        ({"bits": "32-2-8"}, "need quantized weights"),
        ({"bits": 2}, "bits"),
        ({"weight_quantizer": "bwn"}, "weight_quantizer"),
        ({"weight_granularity": "per_column"}, "weight_granularity"),
        ({"activation_quantizer": "percentile"}, "activation_quantizer"),
        ({"activation_granularity": "per_row"}, "activation_granularity"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "64"}, "group_size"),
        ({"hidden_size": 37}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 129}, "num_hidden_layers"),
        ({"weight_bits": 2}, "weight_bits"),
        ({"ghost_ratio": 2}, "ghost_ratio"),
        ({"hidden_act": "none"}, "hidden_act"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"chunk_size_feed_forward": 4}, "chunk_size_feed_forward"),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("backbone", HEADS)
def test_configs_are_checked_at_birth(backbone, fields, text):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=text):
        config(backbone, **fields)


def test_get_model_class_names_what_is_known():
    for arguments, text in (
        (("octal", "bert", "base"), "family.*binary.*ternary"),
        (("ternary", "gpt", "base"), "backbone.*electra"),
        (("ternary", "bert", "causal-lm"), "head.*masked-lm"),
    ):
        with pytest.raises(ValueError, match=text):
            get_model_class(*arguments)


def test_attention_that_would_not_quantize_is_refused():
    model = latent()
    assert model.config._attn_implementation == "qbert"
    with pytest.raises(ValueError, match="would not quantize"):
        model.set_attn_implementation("flash_attention_2")
    expected = answers(model, inputs())
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert torch.equal(answers(model, inputs()), expected), name
