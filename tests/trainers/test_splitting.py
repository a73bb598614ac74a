"""Ternary weight splitting: sums of latent weights, of quantized weights, and the logits of whole models."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from modeling_qbert import get_model_class, quantize_bwn, quantize_twn
from trainers.initialization import initial_student
from trainers.recipe import Recipe
from trainers.splitting import split_state_dict, split_ternary


SIZES = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 12,
    "intermediate_size": 50,
    "vocab_size": 97,
    "max_position_embeddings": 40,
}


def weights(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(40, 33, generator=generator)
    return {
        "normal": normal,
        "small": normal * 1e-6,
        "shifted": normal + 0.4,
        "heavy tails": normal**5,
        "no zeros": normal.sign() * (1 + 0.1 * normal.abs()),
        "rows of zeros": torch.where(torch.arange(40).view(-1, 1) % 3 == 0, 0.0, normal),
        "sparse": torch.where(normal > 1.5, normal, 0.0),
        "all zeros": torch.zeros(40, 33),
        "one column": normal[:, :1],
    }[name]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "small",
        "shifted",
        "heavy tails",
        "no zeros",
        "rows of zeros",
        "sparse",
        "all zeros",
        "one column",
    ],
)
def test_both_sums_are_kept(name, granularity):
    weight = weights(name)
    first, second = split_ternary(weight, granularity)
    assert first.dtype == second.dtype == weight.dtype
    largest = float(weight.abs().max())
    torch.testing.assert_close(first + second, weight, rtol=1e-6, atol=1e-6 * largest)
    binary = quantize_bwn(first, granularity).dequantize() + quantize_bwn(second, granularity).dequantize()
    assert torch.equal(binary, quantize_twn(weight, granularity).dequantize())


def test_the_signs_of_the_formula_matter():
    """With the signs of J and K exchanged, as the formula is printed, the planes' scales differ."""
    weight = weights("shifted")
    first, second = (quantize_bwn(plane, "per_tensor").scale for plane in split_ternary(weight))
    assert torch.equal(first, second)
    kept = quantize_twn(weight, "per_tensor").codes != 0
    up, down = ~kept & (weight > 0), ~kept & (weight <= 0)
    a = (weight[kept].abs().sum() + weight[up].sum() - weight[down].abs().sum()) / (2 * weight[kept].abs().sum())
    assert abs(float(a * weight[kept].abs().sum()) - float((first - second.new_zeros(1)).sum())) > 1e-3


@pytest.mark.parametrize(
    "weight, granularity, message",
    [
        (torch.zeros(3), "per_tensor", r"finite float matrix \(O, I\), found torch.float32 \[3\]"),
        (torch.full((2, 2), torch.nan), "per_tensor", "finite float matrix"),
        (torch.zeros(2, 2, dtype=torch.int8), "per_row", "found torch.int8"),
        (torch.zeros(2, 2), "per_group", "found 'per_group'"),
    ],
)
def test_bad_weights_are_refused(weight, granularity, message):
    with pytest.raises(ValueError, match=message):
        split_ternary(weight, granularity)


def test_missing_tensors_are_named():
    with pytest.raises(ValueError, match="no tensors .*query"):
        split_state_dict({"a": torch.zeros(2, 2)}, {"query": "per_tensor"}, set())


def stage(**quantization):
    fields = {"bits": "1-1-8", "planes": 2, **quantization}
    stages = [{"name": "ternary"}, {"name": "split", "init": "split", "quantization": fields}]
    recipe = {
        "name": "tiny",
        "family": "binary",
        "data": {"task": "sst2"},
        "teacher": {"model": "x"},
        "stages": stages,
    }
    recipe = Recipe.from_dict(recipe)
    return recipe, recipe.stages[1]


def save_ternary(folder, backbone, **fields):
    torch.manual_seed(0)
    model_class = get_model_class("binary", backbone, "sequence-classification")
    sizes = SIZES | ({"embedding_size": 28} if backbone == "electra" else {})
    model = model_class(model_class.config_class(**{**sizes, "bits": "2-2-8", **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith((".step", ".clip")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.calibrate(**batch())
    model.save_pretrained(folder)
    return model


def batch():
    ids = torch.randint(3, 97, (4, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": "2-2-32"},
        {"bits": "2-2-32", "weight_granularity": "per_row"},
        {"embedding_granularity": "per_tensor"},
        {"bits": "2-2-4", "activation_quantizer": "lsq", "hidden_act": "relu"},
        {"activation_quantizer": "pact"},
    ],
    ids=lambda fields: "-".join(fields.values()) or "default",
)
@pytest.mark.parametrize("backbone", ["bert", "roberta", "electra"])
def test_a_split_model_answers_as_its_ternary_one(backbone, fields, tmp_path):
    ternary = save_ternary(tmp_path, backbone, **fields)
    quantization = {**fields, "bits": "1-1-" + fields.get("bits", "2-2-8")[4:]}
    split = initial_student(*stage(**quantization), str(tmp_path), {}).eval()
    assert split.config.planes == 2 and split.config.head_dim == 12
    name = f"{split.base_model_prefix}.encoder.layer.0.attention.self.query"
    query, original = split.get_submodule(name), ternary.get_submodule(name)
    torch.testing.assert_close(query.weight.sum(0), original.weight, rtol=1e-6, atol=1e-7)
    assert torch.equal(query.bias, torch.stack((original.bias / 2, original.bias / 2)))
    state = ternary.state_dict()
    steps = [name for name in state if name.endswith((".step", ".clip"))]
    assert bool(steps) == ("activation_quantizer" in fields)
    assert all(torch.equal(split.state_dict()[name], state[name]) for name in steps)
    with torch.no_grad():
        before, after = ternary(**batch()).logits, split(**batch()).logits
        packed = split.pack()(**batch()).logits
    assert torch.equal(after, before) and torch.equal(packed, before)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weight_quantizer": "lat"}, "ternary by TWN .*found .*lat"),
        ({"bits": "8-2-8"}, "ternary by TWN .*int8"),
        ({"weight_granularity": "per_row"}, "granularity 'per_tensor', found .*per_row"),
        ({"bits": "32-32-32"}, "ternary by TWN .*found None"),
    ],
)
def test_only_what_can_be_split_is_split(fields, message, tmp_path):
    save_ternary(tmp_path, "bert", **fields)
    with pytest.raises(ValueError, match=message):
        initial_student(*stage(), str(tmp_path), {})


def test_a_float_model_does_not_load_into_planes(tmp_path):
    """Planes come from splitting; a checkpoint of one plane is not silently spread over two."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path)
    model_class = get_model_class("binary", "bert", "sequence-classification")
    with pytest.raises(ValueError, match="mismatch"):
        model_class.from_pretrained(tmp_path, planes=2)
