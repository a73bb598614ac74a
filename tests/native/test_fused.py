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


BACKBONES = ("bert", "roberta", "electra")
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
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_setting(level, backbone, setting, packing):
    if level != "avx512" and packing == "dense":
        pytest.skip("a layout of the file: the same for every path")
    model = latent(backbone, "base", **SETTINGS[setting]).pack(packing)
    assert_same(model, inputs())


BINARY_SETTINGS = {
    "W1A8": {"bits": "1-1-8"},
    "W1A8, two planes": {"bits": "1-1-8", "planes": 2},
    "two planes, embedding per tensor": {"bits": "1-1-8", "planes": 2, "embedding_granularity": "per_tensor"},
    "two planes, embedding per group": {"bits": "1-1-8", "planes": 2, "embedding_granularity": "per_group"},
    "W1A8, some split": {
        "bits": "1-1-8",
        "planes": 2,
        "split_modules": ["encoder.layer.0.attention.self.key", "encoder.layer.1.attention.self.value"],
    },
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


PRUNED = {"head_dim": 12, "num_attention_heads": 2}  # of three heads: one ghost feature after the attention
GHOST_SETTINGS = {
    "2-2-8, after both": {},
    "2-2-8, no pruning": {"ghost_features": 3, "ghost_normalization": "none"},
    "2-2-8, after the attention": {**PRUNED, "ghost_placement": "attention", "ghost_features": 2},
    "2-2-8, after the feed-forward": {**PRUNED, "ghost_placement": "feed_forward", "ghost_kernel_size": 5},
    "2-2-8, one token": {**PRUNED, "ghost_kernel_size": 1},
    "1-1-8": {**PRUNED, "bits": "1-1-8"},
    "1-1-8, two planes": {**PRUNED, "bits": "1-1-8", "planes": 2, "ghost_kernel_size": 5, "ghost_features": 2},
    "1-1-4": {**PRUNED, "bits": "1-1-4", "activation_quantizer": "lsq", "ghost_normalization": "none"},
    "8-8-8": {"bits": "8-8-8", "ghost_features": 1, "ghost_kernel_size": 9},
}


def masked_inputs(batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Masks with holes, not only padding; the first token of a sentence stays."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 3, (batch, tokens), generator=generator).clamp(max=1)
    mask[:, 0] = 1
    return {"input_ids": torch.randint(0, 97, (batch, tokens), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("setting", GHOST_SETTINGS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_ghosts(level, backbone, setting):  # noqa: ARG001
    model = latent(backbone, "base", family="ghost", **{"bits": "2-2-8", **GHOST_SETTINGS[setting]})
    expected, _ = both(model, inputs())
    model = model.pack()
    assert_same(model, inputs())
    assert torch.equal(both(model, inputs())[0], expected)
    for threads, (batch, tokens) in ((1, (3, 38)), (2, (5, 21)), (3, (2, 4)), (2, (19, 30))):
        torch.set_num_threads(threads)
        assert_same(model, masked_inputs(batch, tokens, seed=threads))


@pytest.mark.parametrize("ternary", [0, 1])
def test_layers_whose_codes_are_padded_differently(level, ternary):  # noqa: ARG001
    """1-bit weights round 48 columns up to 64, ternary ones do not; each layer may have either."""
    modules = [f"encoder.layer.{ternary}.attention.self.{name}" for name in ("query", "key", "value")]
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 12, "max_position_embeddings": 160}
    model = latent("bert", "base", family="binary", bits="1-1-8", ternary_modules=modules, **sizes).pack()
    for batch, tokens in ((1, 128), (3, 20)):
        assert_same(model, masked_inputs(batch, tokens))


@pytest.mark.parametrize("fields", [{}, {"activation_quantizer": "symmetric"}, {"activation_quantizer": "pact"}])
def test_what_is_no_number_is_none_in_the_answer(level, fields):  # noqa: ARG001
    model = latent("bert", "base", family="binary", bits="1-1-8", **fields).pack()
    embedded = torch.randn(2, 7, 36)
    embedded[0, 3, 5] = float("nan")
    with torch.no_grad():
        found = model(inputs_embeds=embedded)[0]
        expected = model(inputs_embeds=embedded, output_hidden_states=True)[0]  # in torch
    assert is_fused(model) and bool(found[0].isnan().all()) and bool(expected[0].isnan().all())
    assert torch.equal(found[1], expected[1])


def test_ghosts_that_the_engine_leaves_to_torch():
    model = latent("bert", "base", family="ghost", bits="2-2-8", ghost_features=1, ghost_activation="tanh").pack()
    fast, slow = both(model, inputs())
    assert torch.equal(fast, slow)
    assert not is_fused(model) and "Tanh" in model._fused_engine.why


def test_changed_ghosts_are_a_new_engine():
    model, given = latent("bert", "base", family="ghost", bits="2-2-8", ghost_features=1).pack(), inputs()
    before, _ = both(model, given)
    ghosts = model.encoder.layer[0].attention.output.dropout
    for change in (ghosts.ghost_scale.mul_, ghosts.ghost_kernel.mul_):
        with torch.no_grad():
            change(-1.5)
        assert_same(model, given)
        after, _ = both(model, given)
        assert not torch.equal(after, before)
        before = after
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(both(twin, given)[0], before) and is_fused(twin)


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_every_head(backbone, head):
    assert_same(latent(backbone, head).pack(), inputs(head))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_batches_and_masks(backbone, threads):
    model = latent(backbone, "base").pack()
    torch.set_num_threads(threads)
    for batch, tokens in ((1, 1), (1, 38), (7, 3), (19, 21), (2, 38)):
        generator = torch.Generator().manual_seed(tokens)
        given = masked_inputs(batch, tokens, seed=tokens)
        given["token_type_ids"] = torch.randint(0, 2, (batch, tokens), generator=generator)
        assert_same(model, given)
        positions = torch.randint(2, 40, (1, tokens), generator=generator)
        assert_same(model, given | {"position_ids": positions})
        fast, slow = both(model, given)
        assert torch.equal(fast, slow)


WHOLE_HEADS = {"num_attention_heads": 4, "head_dim": 16}  # heads that threads can have for themselves
WHOLE_HEAD_SETTINGS = {
    "2-2-8": ("ternary", {}),
    "1-1-4": ("binary", {"bits": "1-1-4", "activation_quantizer": "lsq"}),
    "1-1-8, two planes": ("binary", {"bits": "1-1-8", "planes": 2}),
    "2-2-8, ghosts": ("ghost", {"bits": "2-2-8", "ghost_features": 1}),
}


@pytest.mark.parametrize("setting", WHOLE_HEAD_SETTINGS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_fewer_sentences_than_threads(level, backbone, setting):  # noqa: ARG001
    family, fields = WHOLE_HEAD_SETTINGS[setting]
    model = latent(backbone, "base", family=family, **WHOLE_HEADS, **fields).pack()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for batch, tokens in ((1, 1), (1, 38), (2, 17), (3, 5)):
            assert_same(model, masked_inputs(batch, tokens, seed=tokens))


def test_a_wave_of_many_sentences():
    model = latent("bert", "base").pack()
    given = inputs(batch=3, tokens=40)
    given = {name: tensor.repeat(30, 1) for name, tensor in given.items()}
    for threads in (1, 2, 5):
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
    for tensor in (model.encoder.layer[0].output.LayerNorm.bias, model.encoder.layer[1].intermediate.dense.bias):
        before = both(model, given)[0]
        tensor.data.add_(1)  # counts no version
        assert_same(model, given)
        assert not torch.equal(both(model, given)[0], before)
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
