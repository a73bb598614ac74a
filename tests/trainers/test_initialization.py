"""Where a stage's student starts: partially random networks."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from modeling_qbert.quantizers import lat_scale
from trainers.distillation import LEARNED_STEP
from trainers.initialization import initial_student
from trainers.recipe import Recipe


CONFIG = BertConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, vocab_size=97, pad_token_id=0
)
BITS = {"bits": "1-1-1", "activation_quantizer": "lsq"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return str(folder), model.state_dict()


def initial(folder, seed=1, family="binary", **stage):
    stage = {"init": "random_encoder", "quantization": BITS, **stage}
    common = {"name": "tiny", "family": family, "data": {"task": "sst2"}, "teacher": {"model": folder}}
    recipe = Recipe.from_dict({**common, "stages": [stage]})
    torch.manual_seed(seed)
    return initial_student(recipe, recipe.stages[0], folder, {})


def student(folder, seed=1, **stage):
    return initial(folder, seed, **stage).state_dict()


@pytest.mark.parametrize(
    "parts, changed",
    [
        ([], ["encoder."]),
        (["embeddings"], ["embeddings."]),
        (["embeddings", "encoder"], ["embeddings.", "encoder."]),
        (["lower"], ["encoder.layer.0.", "encoder.layer.1."]),
        (["upper"], ["encoder.layer.2.", "encoder.layer.3."]),
        (["attention"], [f"encoder.layer.{layer}.attention." for layer in range(4)]),
        (
            ["feed_forward"],
            [f"encoder.layer.{layer}.{part}." for layer in range(4) for part in ("intermediate", "output")],
        ),
    ],
)
def test_only_the_parts_named_are_new(teacher, parts, changed):
    folder, weights = teacher
    state = student(folder, random_parts=parts)
    for name, weight in weights.items():
        new = name.removeprefix("bert.").startswith(tuple(changed))
        assert torch.equal(state[name], weight) != new, name
    assert all(float(value) == 0 for name, value in state.items() if name.endswith(".step"))


def test_loss_aware_scales_are_those_of_the_new_weights(teacher):
    folder, _ = teacher
    bits = {"bits": "2-2-8", "weight_quantizer": "lat"}
    model = initial(folder, family="ternary", quantization=bits, random_parts=["encoder"])
    for name, module in model.named_modules():
        if getattr(module, "weight_scale", None) is not None:
            expected = lat_scale(module.weight, None, module.spec.granularity, module.spec.group_size)
            assert torch.equal(module.weight_scale, expected), name


def test_new_weights_are_those_of_a_new_model_and_seeded(teacher):
    folder, _ = teacher
    state = student(folder, random_parts=["embeddings", "encoder"])
    again, other = (student(folder, seed, random_parts=["embeddings", "encoder"]) for seed in (1, 2))
    assert all(torch.equal(state[name], again[name]) for name in state)
    for name, tensor in state.items():
        if "LayerNorm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight"))))
        elif name.startswith("bert.encoder") and name.endswith("bias"):
            assert not tensor.any()
        elif name.startswith("bert.e") and name.endswith("weight") and tensor.dim() == 2:
            assert not torch.equal(tensor, other[name])
            if tensor.numel() > 500:
                assert 0.017 < float(tensor.std()) < 0.023
    assert not state["bert.embeddings.word_embeddings.weight"][0].any()  # padding


def test_random_parts_need_their_init(teacher):
    with pytest.raises(ValueError, match="random_parts: expected nothing, unless init"):
        student(teacher[0], init="teacher", random_parts=["lower"])
    with pytest.raises(ValueError, match="random_parts.0: expected one of 'embeddings'"):
        student(teacher[0], random_parts=["middle"])


def test_other_activation_bits_get_step_sizes_of_their_own(teacher, tmp_path):
    """A stage that continues with the same bits continues with the same steps; weights stay in any case."""
    model = initial(teacher[0], init="teacher", quantization=BITS | {"bits": "1-1-2"})
    ids = torch.randint(1, 97, (4, 9))
    model.calibrate(input_ids=ids)
    model.save_pretrained(tmp_path)
    before = model.state_dict()
    same = student(str(tmp_path), init="teacher", quantization=BITS | {"bits": "1-1-2"})
    assert all(torch.equal(same[name], tensor) for name, tensor in before.items())
    one_bit = initial(str(tmp_path), init="teacher")
    after = one_bit.state_dict()
    learned = [name for name in after if name.endswith(LEARNED_STEP)]
    assert sum(name.endswith(".shift") for name in learned) > 20
    assert not any(after[name].any() for name in learned)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in learned)
    one_bit.calibrate(input_ids=ids)
    assert all(float(step) > 0 for name, step in one_bit.state_dict().items() if name.endswith(".step"))
