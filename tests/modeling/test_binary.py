"""Binary weights in one or two planes, learned activation quantizers, pruned heads: packed equals fake-quant."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import answers, assert_same_codes, inputs, latent, quantized_layers, read_parts

from modeling_qbert import (
    BinaryBertConfig,
    BinaryBertForSequenceClassification,
    checkpoint_report,
    format_report,
    ops,
    verify_checkpoint,
)
from modeling_qbert.modeling_ternary import HEADS
from modeling_qbert.quantizers import MIN_STEP, ActivationQuantizer, LsqQuantizer, PactQuantizer


SETTINGS = {
    "plain": {},
    "split": {"planes": 2},
    "some split": {"planes": 2, "split_modules": ["encoder.layer.0.output.dense", "embeddings.word_embeddings"]},
    "some ternary": {"ternary_modules": ["encoder.layer.1.attention.self.query", "embeddings.word_embeddings"]},
    "A4": {"bits": "1-1-4", "activation_quantizer": "lsq", "hidden_act": "relu", "planes": 2},
    "A8 by steps": {"activation_quantizer": "lsq"},
    "clips": {"activation_quantizer": "pact", "planes": 2},
    "clips over the batch": {"activation_quantizer": "pact", "activation_granularity": "per_tensor"},
    "one bit everywhere": {"bits": "1-1-1", "activation_quantizer": "lsq", "hidden_act": "relu"},
    "one bit, centered": {"bits": "1-1-1", "activation_quantizer": "lsq", "binary_quantizer": "centered"},
    "A2": {"bits": "1-1-2", "activation_quantizer": "lsq"},
    "W4A8": {"bits": "4-4-8"},
    "W3A4 by group": {"bits": "3-4-4", "weight_granularity": "per_group"},
    "W4 alone": {"bits": "4-3-32", "embedding_granularity": "per_tensor"},
    "activations off": {"bits": "1-1-32", "planes": 2},
    "8-bit positions": {"position_bits": 8},
    "two wide heads": {"head_dim": 15, "num_attention_heads": 2},
    "five heads, A4": {
        "head_dim": 4,
        "num_attention_heads": 5,
        "planes": 2,
        "bits": "1-1-4",
        "activation_quantizer": "lsq",
    },
    "by row": {"planes": 2, "weight_granularity": "per_row"},
    "by group": {"planes": 2, "weight_granularity": "per_group", "embedding_granularity": "per_tensor"},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("backbone", HEADS)
def test_packed_equals_fake_quant(backbone, setting, tmp_path):
    for head in ("sequence-classification", "masked-lm"):
        model = latent(backbone, head, family="binary", **{"bits": "1-1-8", **setting})
        given, expected = inputs(head), answers(model, inputs(head))
        packed = model.pack()
        assert_same_codes(model, packed)
        assert torch.equal(answers(packed, given), expected)
        packed.save_pretrained(tmp_path / head)
        verify_checkpoint(tmp_path / head)
        loaded = type(model).from_pretrained(tmp_path / head)
        assert torch.equal(answers(loaded, given), expected)
        loaded.save_pretrained(tmp_path / "again")
        again = (tmp_path / "again" / "model.safetensors").read_bytes()
        assert again == (tmp_path / head / "model.safetensors").read_bytes()
        report = checkpoint_report(tmp_path / head)
        assert report["bytes"] == sum(report["parts"].values())


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_weight_learns(setting, tmp_path):
    model = latent(family="binary", **{"bits": "1-1-8", **setting}).train()
    model(**inputs(), labels=torch.tensor([0, 1, 0])).loss.backward()
    lost = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not lost
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(answers(loaded, inputs()), answers(model.eval(), inputs()))


def test_two_planes_are_their_sum():
    """Against plain float arithmetic: what both planes' binary weights add up to."""
    model = latent(family="binary", bits="1-1-32", planes=2)
    plain = model.dequantize()
    torch.testing.assert_close(answers(model, inputs()), answers(plain, inputs()), rtol=1e-4, atol=1e-4)
    layer = quantized_layers(model)["bert.encoder.layer.0.output.dense"]
    value = (layer.quantize_weight().codes * layer.quantize_weight().scale).sum(0)
    assert torch.equal(plain.get_submodule("bert.encoder.layer.0.output.dense").weight, value)
    assert len(value.unique()) == 4  # two signs of each of two scales
    codes = layer.quantize_weight().codes
    assert set(codes.unique().tolist()) == {-1, 1}


def test_a_pruned_network_dequantizes_in_its_own_class():
    model = latent(family="binary", bits="1-1-32", head_dim=5, num_attention_heads=4)
    plain = model.dequantize()
    assert type(plain) is type(model) and plain.config.bits == "32-32-32" and plain.config.head_dim == 5
    torch.testing.assert_close(answers(model, inputs()), answers(plain, inputs()), rtol=1e-4, atol=1e-4)


def test_query_key_and_value_share_their_input_quantizer(tmp_path):
    model = latent(family="binary", bits="1-1-4", activation_quantizer="lsq")
    names = [name for name in model.state_dict() if "layer.0." in name and name.endswith(".step")]
    assert len(names) == 8  # input, query, key, value, probabilities; output; two of the feed-forward
    attention = model.bert.encoder.layer[0].attention.self
    packed = model.pack()
    for owner in (attention, packed.bert.encoder.layer[0].attention.self):
        layers = (owner.query, owner.key, owner.value)
        assert all(layer.activation is owner.input_quantizer and layer.shares_input for layer in layers)
    assert packed.bert.encoder.layer[0].attention.self.input_quantizer is not attention.input_quantizer
    packed.save_pretrained(tmp_path)
    header, _ = read_parts(tmp_path / "model.safetensors")
    assert set(names) <= set(header)


# Learned step sizes and clips


def test_elastic_binarization():
    """One signed bit: step * sign(x - shift). One bit from 0 up: step or nothing. Gradients as BiT has them."""
    signs = LsqQuantizer(1, None, features=100, channels=3)
    x = torch.tensor([[0.3, -0.2, 4.0], [0.0, -3.0, 0.1]], requires_grad=True)
    with torch.no_grad():
        signs.step.fill_(0.5)
        signs.shift.copy_(torch.tensor([0.4, 0.0, 0.0]))
    carrier, quantized = ops.quantize(x, signs)
    codes = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    assert torch.equal(quantized.codes, codes) and torch.equal(quantized.dequantize(), 0.5 * codes)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (carrier * weight).sum().backward()
    inside = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert torch.equal(x.grad, weight * inside) and torch.equal(signs.shift.grad, -(weight * inside).sum(0))
    torch.testing.assert_close(signs.step.grad, (weight * codes).sum() / 10)
    flags = LsqQuantizer(1, 0.0, features=100)
    with torch.no_grad():
        flags.step.fill_(0.5)
    _, quantized = ops.quantize(torch.tensor([[0.0, 0.24, 0.26, 9.0]]), flags)
    assert quantized.codes.tolist() == [[0.0, 0.0, 1.0, 1.0]] and not hasattr(flags, "shift")
    signs.reset()
    signs.calibrate(torch.tensor([[1.0, -3.0, 2.0]]), None)
    assert float(signs.step) == pytest.approx(4.0)  # BiT's first scale: twice the mean magnitude


@pytest.mark.parametrize("low", [None, 0.0, -0.17])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_step_size_forward_and_gradient(bits, low):
    """Against LSQ's equations written out: the gradient of the step is (round(v) - v) inside and the bound outside."""
    quantizer = LsqQuantizer(bits, low, features=100)
    x = torch.linspace(-3, 3, 101, dtype=torch.float32).view(1, -1).requires_grad_()
    with torch.no_grad():
        quantizer.step.fill_(0.21)
    carrier, quantized = ops.quantize(x, quantizer)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if low is None else (0, 2**bits - 1)
    level = (x.detach() - (low or 0)) / 0.21
    codes = level.round().clamp(least, most)
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(quantized.dequantize(), codes * 0.21 + (low or 0))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (carrier * weight).sum().backward()
    inside = (level >= least) & (level <= most)
    assert torch.equal(x.grad, weight * inside)
    slope = torch.where(inside, codes - level, codes)
    expected = (weight * slope).sum() / (100 * most) ** 0.5
    torch.testing.assert_close(quantizer.step.grad, expected, rtol=1e-4, atol=1e-5)


def test_calibration_ignores_padding_and_happens_once():
    model = latent(family="binary", bits="1-1-4", activation_quantizer="lsq")
    steps = {name: step.clone() for name, step in model.state_dict().items() if name.endswith(".step")}
    assert len(steps) == 17 and all(step >= MIN_STEP for step in steps.values())
    model.calibrate(**inputs(seed=9))
    assert all(torch.equal(model.state_dict()[name], step) for name, step in steps.items())
    first = "bert.encoder.layer.0.attention.self.input_quantizer"
    given = inputs()
    wide = {name: torch.nn.functional.pad(tensor, (0, 9)) for name, tensor in given.items()}
    model.get_submodule(first).reset()
    model.calibrate(**wide)
    torch.testing.assert_close(model.state_dict()[f"{first}.step"], steps[f"{first}.step"], rtol=1e-6, atol=0)


def test_step_sizes_without_a_value_are_refused():
    config = BinaryBertConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, vocab_size=97, bits="1-1-4",
        activation_quantizer="lsq",
    )  # fmt: skip
    model = BinaryBertForSequenceClassification(config).eval()
    with pytest.raises(ValueError, match=r"call model\.calibrate"):
        answers(model, inputs())
    with pytest.raises(ValueError, match=r"quantizer\.step has no value yet"):
        model.pack()
    model.calibrate(**inputs())
    answers(model.pack(), inputs())


def test_a_step_never_falls_to_zero():
    quantizer = LsqQuantizer(4, None, features=10)
    with torch.no_grad():
        quantizer.step.fill_(-0.3)  # an update carried it past 0
    x = torch.tensor([[1.0, -1.0]], requires_grad=True)
    carrier, quantized = ops.quantize(x, quantizer)
    assert float(quantized.scale) == pytest.approx(MIN_STEP) and torch.isfinite(quantized.dequantize()).all()
    carrier.sum().backward()
    assert torch.isfinite(quantizer.step.grad)


def test_clips_get_the_gradient_of_what_they_clip():
    quantizer = PactQuantizer(ActivationQuantizer(8, True, False))
    x = torch.tensor([[-4.0, -1.0, 0.5, 3.0, 5.0]], requires_grad=True)
    carrier, quantized = ops.quantize(x, quantizer)
    torch.testing.assert_close(quantized.dequantize(), x.detach().clamp(-2.5, 2.5), rtol=0, atol=2.5 / 127 / 2 + 1e-6)
    (carrier * torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])).sum().backward()
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 0.0, 0.0]]
    assert quantizer.clip.grad.tolist() == [1.0, 9.0]


def test_casts_never_round_steps_and_clips():
    for bits, kind in (("1-1-8", "lsq"), ("1-1-8", "pact"), ("1-1-1", "lsq")):
        model = latent(family="binary", bits=bits, activation_quantizer=kind).pack()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "_quantizer." in name}
        assert any(name.endswith("shift") for name in before) == (bits == "1-1-1")
        model.to(torch.bfloat16)
        assert before and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        assert model.classifier.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": "2-2-8", "planes": 2}, "need binary weights"),
        ({"bits": "1-1-2"}, "activation_quantizer` must be 'lsq' for 2-bit"),
        ({"bits": "1-1-3"}, "activations must have one of"),
        ({"planes": 2, "binary_quantizer": "centered"}, "must be 'bwn' with 2 planes"),
        ({"split_modules": []}, "`planes` to be 2"),
        ({"planes": 3}, "planes"),
        ({"planes": 2, "split_modules": ["encoder.layer.9.output.dense"]}, r"split_modules.*layer\.9"),
        ({"ternary_modules": ["embeddings.position_embeddings"]}, "ternary_modules.*position"),
        ({"position_bits": 4}, "position_bits"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_attention_heads": 5}, "multiple of `num_attention_heads`"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        latent(family="binary", **{"bits": "1-1-8", **fields})


@pytest.mark.parametrize("planes, granularity, dtype", [
    (1, "per_row", "BF16"), (1, "per_group", "BF16"), (1, "per_tensor", "F32"), (2, "per_row", "F32"),
])  # fmt: skip
def test_scales_of_a_binary_word_embedding(planes, granularity, dtype, tmp_path):
    """A scale for each row of bits is short, rounded in training as in the file; planes must add up exactly."""
    model = latent(family="binary", bits="1-1-8", planes=planes, embedding_granularity=granularity)
    words = model.get_input_embeddings()
    scale = words.quantize_weight().scale
    assert scale.dtype == torch.float32 and torch.equal(scale.bfloat16().float(), scale) == (dtype == "BF16")
    ids = torch.arange(words.num_embeddings)
    packed = model.pack()
    packed.save_pretrained(tmp_path)
    loaded = type(packed).from_pretrained(tmp_path, dtype=torch.float16)
    header, _ = read_parts(tmp_path / "model.safetensors")
    assert header["bert.embeddings.word_embeddings.weight_scale"]["dtype"] == dtype
    assert torch.equal(loaded.get_input_embeddings()(ids), packed.get_input_embeddings()(ids).half())
    loaded.to(torch.float32)
    assert torch.equal(loaded.get_input_embeddings().quantize_weight().scale, scale)


# Sizes


@pytest.mark.parametrize(
    "fields, limit",
    [
        ({}, 15_800_000),
        ({"position_bits": 8}, 14_700_000),
        ({"planes": 2, "num_attention_heads": 6, "head_dim": 64, "intermediate_size": 1536}, 18_900_000),
        (
            {"planes": 2, "num_attention_heads": 6, "head_dim": 64, "intermediate_size": 1536, "position_bits": 8},
            17_800_000,
        ),
    ],
    ids=["plain", "plain, 8-bit positions", "split", "split, 8-bit positions"],
)
def test_bert_base_fits(fields, limit, tmp_path):
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = BinaryBertForSequenceClassification(BinaryBertConfig(**fields))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    model.pack().save_pretrained(tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".py")
    assert files <= limit
    report = checkpoint_report(tmp_path)
    if "planes" not in fields:
        assert report["parameters"] == 109_482_240 + 2 * 768 + 2
        # BinaryBERT's table has 13.4, TPQ's abstract 31 times smaller; without the pooler it would be 13.38.
        line = "as the papers count (see checkpoint_report): 13.46 of 417.65 MiB, 31.0 times smaller"
        assert line in format_report(tmp_path).splitlines()
