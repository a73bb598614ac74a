"""The fused forward of a model: when it runs, and that it gives what the layers one by one give."""

import copy
import os
import pickle
import sys

import pytest
import torch


sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "modeling"))

from tiny import EVERY_HEAD, ODD, inputs, latent, randomize  # noqa: E402

from modeling_qbert import fused, get_model_class  # noqa: E402


SETTINGS = {
    "defaults": {},
    "symmetric": {"activation_quantizer": "symmetric"},
    "4-bit activations": {"bits": "2-2-4"},
    "8 bits": {"bits": "8-8-8"},
    "scale per row": {"weight_granularity": "per_row", "embedding_granularity": "per_tensor"},
    "scale per group": {"weight_granularity": "per_group", "embedding_granularity": "per_group", "group_size": 16},
    "ReLU": {"hidden_act": "relu"},
    "float embedding": {"bits": "2-32-8"},
}


@torch.no_grad()
def both(model, given, **options):
    """Outputs for real tokens: fused and layer by layer."""
    answers = []
    for answer in (fused._answer, lambda *_: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "_answer", answer)
            output = model(**given, **options)[0]
        real = given["attention_mask"].bool()
        answers.append(output[real] if output.shape[: real.dim()] == real.shape else output)
    return answers


def is_fused(model) -> bool:
    engine = model.base_model.__dict__.get("_fused_engine")
    return engine is not None and engine.encoder is not None


def assert_same(model, given) -> None:
    fast, slow = both(model, given)
    assert is_fused(model)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("packing", ["2bit", "dense"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backbone", ["bert", "roberta", "electra"])
def test_every_setting(level, backbone, setting, packing):
    if level != "avx512" and packing == "dense":
        pytest.skip("a layout of the file: the same for every path")
    model = latent(backbone, "base", **SETTINGS[setting]).pack(packing)
    assert_same(model, inputs())


BINARY_SETTINGS = {
    "W1A8": {"bits": "1-1-8"},
    "W1A8, two planes": {"bits": "1-1-8", "planes": 2},
    "W1A8, learned clips": {"bits": "1-1-8", "activation_quantizer": "pact"},
    "W1A4, learned steps": {"bits": "1-1-4", "activation_quantizer": "lsq"},
    "W1A4, ReLU, two planes": {"bits": "1-1-4", "activation_quantizer": "lsq", "planes": 2, "hidden_act": "relu"},
    "W1A2": {"bits": "1-1-2", "activation_quantizer": "lsq"},
    "W1A1": {"bits": "1-1-1", "activation_quantizer": "lsq"},
    "W1A1, ReLU, scale per group": {
        "bits": "1-1-1",
        "activation_quantizer": "lsq",
        "hidden_act": "relu",
        "weight_granularity": "per_group",
    },
    "W1A1, two planes": {"bits": "1-1-1", "activation_quantizer": "lsq", "planes": 2},
}


@pytest.mark.parametrize("setting", BINARY_SETTINGS)
def test_binary(level, setting):  # noqa: ARG001
    model_class = get_model_class("binary", "bert", "base")
    model = randomize(model_class(model_class.config_class(**{**ODD, "group_size": 32, **BINARY_SETTINGS[setting]})))
    given = inputs()
    model.calibrate(**given)
    for name, parameter in model.named_parameters():
        if name.endswith("_quantizer.shift"):
            torch.nn.init.normal_(parameter, std=0.3)
    assert_same(model.pack(), given)


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_every_head(backbone, head):
    assert_same(latent(backbone, head).pack(), inputs(head))


@pytest.mark.parametrize("backbone", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_batches_and_masks(backbone, threads):
    model = latent(backbone, "base").pack()
    torch.set_num_threads(threads)
    for batch, tokens in ((1, 1), (1, 38), (7, 3), (19, 21), (2, 38)):
        generator = torch.Generator().manual_seed(tokens)
        given = {
            "input_ids": torch.randint(0, 97, (batch, tokens), generator=generator),
            "attention_mask": torch.randint(0, 2, (batch, tokens), generator=generator),  # holes, not only padding
            "token_type_ids": torch.randint(0, 2, (batch, tokens), generator=generator),
        }
        given["attention_mask"][:, 0] = 1
        assert_same(model, given)
        positions = torch.randint(2, 40, (1, tokens), generator=generator)
        assert_same(model, given | {"position_ids": positions})
        fast, slow = both(model, given)
        assert torch.equal(fast, slow)


def test_a_wave_of_many_sentences():
    model = latent("bert", "base").pack()
    given = inputs(batch=3, tokens=40)
    given = {name: tensor.repeat(30, 1) for name, tensor in given.items()}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(model, given)


def test_what_the_engine_leaves_to_torch():
    model, given = latent("bert", "base").pack(), inputs()
    with torch.no_grad():
        expected = model(**given)
        assert is_fused(model)
        assert (expected[0][given["attention_mask"] == 0] == 0).all()  # not computed
        for options in ({"output_hidden_states": True}, {"output_attentions": True}):
            asked = model(**given, **options)
            assert len(asked.hidden_states or asked.attentions) >= 2
        model(**given)
        assert model(**given, return_dict=False)[0].shape == expected[0].shape
        ids = given["input_ids"].clone()
        ids[1, 2] = 97
        with pytest.raises(ValueError, match="found 97"):
            model(input_ids=ids)
        with pytest.raises(IndexError):
            model(**given, token_type_ids=torch.full_like(ids, 2))
        embedded = model.embeddings.word_embeddings(given["input_ids"])
        again = model(inputs_embeds=embedded, attention_mask=given["attention_mask"])
        assert torch.equal(again[0], expected[0])
        left = given["attention_mask"].flip(1)  # a sentence whose first token is hidden
        assert torch.isfinite(model(given["input_ids"], attention_mask=left)[0]).all()
        calls = []
        handle = model.encoder.layer[1].register_forward_hook(lambda *_: calls.append(1))
        model(**given)
        handle.remove()
        assert calls == [1]
    with torch.enable_grad():
        assert model(**given)[0].grad_fn is not None or not any(p.requires_grad for p in model.parameters())


def test_a_changed_model_is_a_new_engine():
    model, given = latent("bert", "base").pack(), inputs()
    assert_same(model, given)
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight.mul_(1.5)
    assert_same(model, given)
    model.encoder.layer[0].output.dense.bias = torch.nn.Parameter(torch.ones(36), requires_grad=False)
    assert_same(model, given)
    other = latent("bert", "base", seed=5).pack()
    model.load_state_dict(other.state_dict())
    assert_same(model, given)
    assert torch.equal(both(model, given)[0], both(other, given)[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_fused(twin)
        assert_same(twin, given)
        assert torch.equal(both(twin, given)[0], both(model, given)[0])


def test_bfloat16_and_double_stay_in_torch():
    for dtype in (torch.bfloat16, torch.float64):
        model, given = latent("bert", "base").pack().to(dtype), inputs()
        with torch.no_grad():
            assert model(**given)[0].dtype == dtype
        assert not is_fused(model)
