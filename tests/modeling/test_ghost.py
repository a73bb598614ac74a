"""Ghost features: their arithmetic, what they may see, that they start as nothing, and what they cost."""

import copy
import threading

import pytest
import torch
from tiny import BACKBONE_SIZES, EVERY_HEAD, ODD, answers, assert_same_codes, config, inputs, latent, randomize
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from modeling_qbert import (
    CheckpointError,
    GhostBertConfig,
    checkpoint_report,
    format_report,
    get_model_class,
    ghost_parameters,
    multiply_adds,
    verify_checkpoint,
)
from modeling_qbert.ghost import GhostFeatures, real_tokens
from modeling_qbert.integration import _HEADS as AUTO_CLASSES
from modeling_qbert.modeling_ghost import HEADS


# Two of three heads of width 12 are kept.
PRUNED = {"family": "ghost", "head_dim": 12, "num_attention_heads": 2}
PLACEMENTS = ("both", "attention", "feed_forward", "none")


def ghosts(backbone="bert", head="sequence-classification", **fields):
    return latent(backbone, head, **{**PRUNED, "bits": "32-32-32", **fields})


def modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, GhostFeatures)}


def silence(model):
    """The same model as it is before training."""
    model = copy.deepcopy(model)
    for module in modules(model).values():
        torch.nn.init.zeros_(module.ghost_scale)
    return model


# Arithmetic


def naive(y, module, real):
    """The sums of `ghost`'s docstring, term by term: y (B, T, C)."""
    kernels = module.ghost_kernel.detach()
    if module.normalization == "softmax":
        kernels = kernels.exp() / kernels.exp().sum(-1, keepdim=True)
    features, channels, size = kernels.shape
    out = y.clone()
    for b, i, f in torch.cartesian_prod(*map(torch.arange, (*y.shape[:2], features))).tolist():
        value = torch.zeros(channels)
        for t in range(size):
            j = i + t - size // 2
            if 0 <= j < y.shape[1] and real[b, j]:
                value += kernels[f, :, t] * y[b, j]
        out[b, i] += module.ghost_scale.detach()[f] * module.activation(value)
    return out


@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("normalization, activation", [("softmax", "relu"), ("none", "gelu"), ("softmax", "tanh")])
def test_a_layer_is_the_sum_over_heads_written_out(size, normalization, activation):
    """Both points of a layer, from per-head products that are convolved one by one; 9 tokens exceed every sentence."""
    model = ghosts(
        ghost_kernel_size=size, ghost_normalization=normalization, ghost_activation=activation, ghost_features=3
    )
    layer, seen = model.bert.encoder.layer[0], {}
    for name in ("attention.output.dense", "output.dense", "attention.output.dropout", "output.dropout"):
        keep = lambda module, args, output, name=name: seen.update({name: (args[0], output)})  # noqa: ARG005, E731
        layer.get_submodule(name).register_forward_hook(keep)
    given = {name: tensor[:, :8] for name, tensor in inputs().items()}
    answers(model, given)
    real = given["attention_mask"].bool()
    context, _ = seen["attention.output.dense"]
    dense, module = layer.attention.output.dense, layer.attention.output.dropout
    linear = copy.deepcopy(module)  # without the non-linearity, whose argument is the sum over heads
    parts = [
        context[..., h * 12 : (h + 1) * 12] @ dense.weight[:, h * 12 : (h + 1) * 12].T + dense.bias / 2 for h in (0, 1)
    ]
    linear.activation = torch.nn.Identity()
    for f in range(3):
        single = copy.deepcopy(linear)
        single.ghost_kernel = torch.nn.Parameter(module.ghost_kernel[f : f + 1].clone())
        single.ghost_scale = torch.nn.Parameter(torch.ones(1, parts[0].shape[-1]))
        convolved = sum(naive(part.detach(), single, real) - part.detach() for part in parts[:2])
        parts.append(module.ghost_scale[f].detach() * module.activation(convolved))
    expected = sum(parts).detach()
    torch.testing.assert_close(seen["attention.output.dropout"][1][real], expected[real], atol=1e-5, rtol=1e-5)
    y, out = seen["output.dense"][1], seen["output.dropout"][1]
    torch.testing.assert_close(out[real], naive(y, layer.output.dropout, real)[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[real], y[real], atol=1e-2)


def test_softmax_kernels_average():
    module = ghosts().bert.encoder.layer[0].output.dropout
    torch.testing.assert_close(module.kernels().sum(-1), torch.ones(1, 36))
    assert bool((module.kernels() > 0).all())


# What a sentence may see: `test_answers` tries every mask on the family, too


@pytest.mark.parametrize("size", [1, 3, 5, 21])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "qbert"])
@pytest.mark.parametrize("backbone", HEADS)
def test_a_sentence_never_sees_padding_or_its_neighbours(backbone, attention, size):
    model = ghosts(backbone, ghost_kernel_size=size)
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    sentences = [torch.randint(5, 97, (1, length), generator=generator) for length in (7, 1, 2, 12)]
    with torch.no_grad():
        alone = torch.cat([model(sentence).logits for sentence in sentences])
        for width, left in ((12, False), (20, False), (20, True)):
            ids, mask = torch.full((4, width), model.config.pad_token_id), torch.zeros(4, width, dtype=torch.long)
            for row, sentence in enumerate(sentences):
                start = width - sentence.shape[1] if left else 0
                columns = slice(start, start + sentence.shape[1])
                ids[row, columns], mask[row, columns] = sentence[0], 1
            if left and backbone != "roberta":  # positions count from the left edge: compare by them
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                together = [model.base_model(ids, attention_mask=mask, position_ids=positions)[0][r] for r in range(4)]
                for row, sentence in enumerate(sentences):
                    expected = model.base_model(sentence)[0][0]
                    torch.testing.assert_close(together[row][mask[row].bool()], expected, atol=1e-5, rtol=1e-5)
            elif not left:
                torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)
    far = torch.cat([sentences[3][:, :6], sentences[3].flip(1)[:, :6]], 1)
    assert not torch.allclose(model(far).logits, model(sentences[3]).logits, atol=1e-3)


def test_real_tokens_of_every_kind_of_mask():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    square = mask.bool()[:, None, None, :].expand(2, 1, 3, 3)
    for form in (mask, mask.float(), square, square[:, :, :1], torch.where(square, 0.0, -10_000.0)):
        assert torch.equal(real_tokens(form), mask.bool())
    assert real_tokens(None) is None


def test_threads_and_checkpointing_keep_their_own_padding():
    """Sentences of one length but other padding, in two threads of one model; and a layer run again in backward."""
    model = ghosts(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    given = [inputs(), inputs() | {"attention_mask": torch.ones(3, 11, dtype=torch.long)}]
    expected = [answers(model, one) for one in given]
    wrong = []

    def work(which):
        for _ in range(30):
            if not torch.equal(answers(model, given[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

    gradients = []
    for checkpointing in (False, True):
        student = copy.deepcopy(model).train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        loss = student(**given[0], labels=torch.tensor([0, 1, 0])).loss
        answers(model, given[1])  # another forward before the backward
        loss.backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_compiled_ghosts_see_the_mask_of_each_call():
    model = ghosts(num_hidden_layers=1, bits="2-2-8").pack()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    other = inputs()["attention_mask"].flip(0)
    with torch.no_grad():
        for mask in (inputs()["attention_mask"], other):
            given = inputs() | {"attention_mask": mask}
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


# The start


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("backbone", HEADS)
def test_a_pruned_checkpoint_keeps_its_answers(backbone, placement, tmp_path):
    fields = {"head_dim": 12, "num_attention_heads": 2, "bits": "32-32-32"}
    model = latent(backbone, family="binary", **fields)
    expected = answers(model, inputs())
    ghost_class = get_model_class("ghost", backbone, "sequence-classification")
    state = model.state_dict()
    started = ghost_class(config(backbone, "ghost", ghost_placement=placement, **fields)).eval()
    missing, unexpected = started.load_state_dict(state, strict=False)
    assert not unexpected and all(".ghost_" in name for name in missing)
    assert bool(missing) == (placement != "none") == bool(modules(started))
    assert torch.equal(answers(started, inputs()), expected)
    started.save_pretrained(tmp_path)
    loaded, info = ghost_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(answers(loaded, inputs()), expected)


def test_a_plain_checkpoint_gets_new_ghosts(tmp_path):
    fields = {name: value for name, value in ODD.items() if name != "group_size"}
    plain = randomize(BertForSequenceClassification(BertConfig(**fields)))
    plain.save_pretrained(tmp_path / "plain")
    ghost_class = get_model_class("ghost", "bert", "sequence-classification")
    model, info = ghost_class.from_pretrained(tmp_path / "plain", ghost_features=2, output_loading_info=True)
    assert not info["missing_keys"] and len(modules(model)) == 4
    assert torch.equal(answers(model, inputs()), answers(plain, inputs()))
    kernels = [module.ghost_kernel for module in modules(model).values()]
    assert [kernel.shape[0] for kernel in kernels] == [2, 1, 2, 1]
    flat = torch.cat([kernel.flatten() for kernel in kernels])
    assert bool(torch.isfinite(flat).all()) and len(flat.unique()) == flat.numel()  # no two start alike

    model.save_pretrained(tmp_path / "ghost")
    with pytest.raises(CheckpointError, match="4 tensors of ghost features that the config lacks"):
        ghost_class.from_pretrained(tmp_path / "ghost", ghost_placement="attention", ghost_features=2)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("1.output.dropout.ghost_scale")
    }
    model.save_pretrained(tmp_path / "ghost", state_dict=state)
    with pytest.raises(CheckpointError, match="1 tensors .* missing.*ghost_scale"):
        ghost_class.from_pretrained(tmp_path / "ghost")


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("normalization", ["softmax", "none"])
def test_every_ghost_learns_after_one_step(normalization, size):
    """At the start only the factors have a gradient, kernels behind a factor of 0 have none; one step later both do.
    The softmax over a kernel of one weight is 1 whatever the weight."""
    model = silence(ghosts(ghost_normalization=normalization, ghost_kernel_size=size, ghost_features=3)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in (0, 1):
        optimizer.zero_grad()
        model(**inputs(), labels=torch.tensor([0, 1, 0])).loss.backward()
        for name, module in modules(model).items():
            assert bool(module.ghost_scale.grad.any(1).all()), name
            trained = module.ghost_kernel.grad.flatten(1).any(1)
            assert bool(trained.all() if step and (size, normalization) != (1, "softmax") else not trained.any()), name
        optimizer.step()


# Bits, files and heads


SETTINGS = {
    "float": {"bits": "32-32-32"},
    "ternary": {"bits": "2-2-8"},
    "ternary, unpruned": {"bits": "2-2-8", "head_dim": None, "num_attention_heads": 3, "ghost_features": 2},
    "ternary A4 by row": {"bits": "2-2-4", "weight_granularity": "per_row", "activation_quantizer": "symmetric"},
    "two planes": {"bits": "1-1-8", "planes": 2},
    "binary A4": {"bits": "1-1-4", "planes": 2, "activation_quantizer": "lsq", "hidden_act": "relu"},
    "binary, clips": {"bits": "1-1-8", "activation_quantizer": "pact", "ghost_kernel_size": 5},
    "8 bits": {"bits": "8-8-8", "ghost_placement": "feed_forward"},
    "activations off": {"bits": "2-2-32", "ghost_placement": "attention", "ghost_normalization": "none"},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("backbone", HEADS)
def test_packed_equals_fake_quant(backbone, setting, tmp_path):
    model = ghosts(backbone, **setting)
    expected = answers(model, inputs())
    assert modules(model) and not torch.equal(answers(silence(model), inputs()), expected)
    model.save_pretrained(tmp_path / "latent")
    assert torch.equal(answers(type(model).from_pretrained(tmp_path / "latent"), inputs()), expected)
    if setting["bits"] == "32-32-32":
        with pytest.raises(ValueError, match="nothing to pack"):
            model.pack()
        return
    packed = model.pack("dense")
    assert_same_codes(model, packed)
    assert torch.equal(answers(packed, inputs()), expected)
    packed.save_pretrained(tmp_path / "packed")
    verify_checkpoint(tmp_path / "packed")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert type(loaded) is type(model) and torch.equal(answers(loaded, inputs()), expected)
    report = checkpoint_report(tmp_path / "packed")
    assert report["bytes"] == sum(report["parts"].values())
    names = [name for name in model.state_dict() if ".ghost_" in name]
    assert report["ghost_parameters"] == sum(model.state_dict()[name].numel() for name in names) > 0
    assert report["parts"]["ghost features"] == 4 * report["ghost_parameters"]  # kernels stay fp32


@pytest.mark.parametrize("bits", ["32-32-32", "2-2-8"])
@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_every_head_through_a_file_and_auto_classes(backbone, head, bits, tmp_path):
    model = ghosts(backbone, head, bits=bits)
    given, expected = inputs(head), answers(model, inputs(head))
    (model if bits == "32-32-32" else model.pack()).save_pretrained(tmp_path)
    loaded, info = AUTO_CLASSES[head][1].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and loaded.is_packed == (bits == "2-2-8")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answers(loaded, given), expected)


def test_dequantize_keeps_the_ghosts():
    model = ghosts(bits="2-2-32")
    plain = model.pack().dequantize()
    assert type(plain) is type(model) and plain.config.bits == "32-32-32" and len(modules(plain)) == 4
    torch.testing.assert_close(answers(plain, inputs()), answers(model, inputs()), atol=1e-4, rtol=1e-4)


def test_a_packed_file_is_bound_to_its_ghosts(tmp_path):
    model = ghosts(bits="2-2-8")
    model.pack().save_pretrained(tmp_path)
    for fields in ({"ghost_kernel_size": 5}, {"ghost_placement": "attention"}, {"ghost_activation": "gelu"}):
        with pytest.raises(CheckpointError, match="ghost"):
            type(model).from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ghost_kernel_size": 2}, "ghost_kernel_size.*odd"),
        ({"ghost_kernel_size": -1}, "ghost_kernel_size"),
        ({"ghost_features": -1}, "ghost_features"),
        ({"ghost_activation": "wave"}, "ghost_activation.*wave"),
        ({"ghost_placement": "middle"}, "ghost_placement"),
        ({"ghost_normalization": "relu"}, "ghost_normalization"),
        ({"ghost_kernels": 3}, "ghost_kernels"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(Exception, match=message):
        GhostBertConfig(**fields)
    with pytest.raises(CheckpointError, match=message):
        GhostBertConfig.from_dict(GhostBertConfig().to_dict() | fields)


# Cost


BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}


@pytest.mark.parametrize("heads", [3, 6, 9, 12])
@pytest.mark.parametrize("shape", [BERT_BASE, MINILM], ids=["BERT-base", "MiniLM"])
@pytest.mark.parametrize("backbone", HEADS)
def test_ghosts_cost_less_than_3_percent(backbone, shape, heads):
    neurons = shape["intermediate_size"] * heads // 12
    fields = shape | {
        "num_attention_heads": heads,
        "head_dim": shape["hidden_size"] // 12,
        "intermediate_size": neurons,
        **({"embedding_size": shape["hidden_size"]} if backbone == "electra" else {}),
    }
    model_class = get_model_class("ghost", backbone, "sequence-classification")
    with torch.device("meta"):
        model = model_class(model_class.config_class(**fields))
        bare = model_class(model_class.config_class(**fields, ghost_placement="none"))
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, bare)]
    assert counts[0] - counts[1] == ghost_parameters(model.config) > 0 == ghost_parameters(bare.config)
    assert counts[0] <= 1.03 * counts[1]
    assert {module.ghost_kernel.shape[0] for module in modules(model).values()} - {1} == {12 - heads} - {0, 1}
    for tokens in (16, 128):
        products = multiply_adds(model.config, tokens)
        assert multiply_adds(bare.config, tokens) == {"backbone": products["backbone"], "ghosts": 0}
        assert 0 < products["ghosts"] <= 0.03 * products["backbone"]


def test_multiply_adds_are_those_of_the_layers():
    """Against the products that a forward pass makes: with matrices, and with columns of kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class KernelProducts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mul.Tensor and isinstance(args[-1], torch.Tensor) and args[-1].dim() == 1:
                self.count += out.numel()
            return out

    for backbone in HEADS:
        model = ghosts(backbone, "base")
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, KernelProducts() as kernels, torch.no_grad():
            model(torch.full((1, 16), 7))
        pooler = 36 * 36 if backbone != "electra" else 0
        counted = multiply_adds(model.config, 16)
        assert kernels.count == counted.pop("ghosts") > 0
        assert counter.get_total_flops() / 2 == sum(counted.values()) + pooler


@pytest.mark.parametrize("bits", ["32-32-32", "1-1-8"])
def test_info_counts_ghosts(bits, tmp_path):
    model = ghosts(bits=bits, planes=2 if bits == "1-1-8" else 1)
    model.save_pretrained(tmp_path / "latent")
    text = format_report(tmp_path / "latent")
    bare = ghosts(bits="32-32-32", ghost_placement="none")
    backbone = sum(parameter.numel() for parameter in bare.parameters())
    assert f"{ghost_parameters(model.config):,} parameters on {backbone:,} of the backbone" in text
    assert f"{multiply_adds(model.config)['ghosts']:,} multiply-adds on" in text
    if bits == "1-1-8":
        model.pack().save_pretrained(tmp_path / "packed")
        packed = format_report(tmp_path / "packed")
        assert text.splitlines()[-1] in packed and "ghost features  " in packed
    with pytest.raises(CheckpointError, match="quantization_config"):
        ghosts(ghost_placement="none").save_pretrained(tmp_path / "bare")
        format_report(tmp_path / "bare")


def test_embedding_sizes_are_tried():
    assert BACKBONE_SIZES["electra"]["embedding_size"] != config("electra", "ghost").hidden_size
