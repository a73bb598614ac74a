"""Ordinary ways of using a Transformers model, each with the answers that the class promises."""

import threading

import pytest
import torch
from tiny import answers, assert_same_codes, config, inputs, latent, quantized_layers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from modeling_qbert import (
    TernaryBertConfig,
    TernaryBertForSequenceClassification,
    TernaryBertModel,
    get_model_class,
)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}


@pytest.mark.parametrize("fields", [{}, {"family": "binary", "bits": "1-1-4", "activation_quantizer": "lsq"}])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_type_changes_no_answer(default, fields):
    """Transformers sets it, for all threads, while any model is loaded."""
    packed, fresh, given = latent(**fields).pack(), latent(**fields).pack(), inputs()
    expected = answers(packed, given)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(answers(packed, given), expected)
        assert torch.equal(answers(fresh, given), expected)  # its first answer: the engine is made now
    finally:
        torch.set_default_dtype(torch.float32)


def test_models_are_loaded_in_other_types_while_one_answers(tmp_path):
    BertForSequenceClassification(BertConfig(**SMALL)).to(torch.float64).save_pretrained(tmp_path)
    packed, given = latent().pack(), inputs()
    expected, done = answers(packed, given), threading.Event()

    def load() -> None:
        while not done.is_set():
            BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        found = [packed(**given).logits.flatten() for _ in range(150)]
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(one, expected) for one in found)


def test_subclasses_of_config_and_head_run_in_the_engine():
    class MyConfig(TernaryBertConfig):
        pass

    class MyHead(TernaryBertForSequenceClassification):
        config_class = MyConfig

    torch.manual_seed(0)
    model = MyHead(MyConfig(**SMALL))
    assert type(model.bert) is TernaryBertModel


def test_a_subclass_keeps_its_own_forward():
    class Mine(TernaryBertModel):
        def forward(self, *args, **kwargs):
            return "mine", super().forward(*args, **kwargs)

    class Derived(Mine):
        pass

    class Plain(TernaryBertModel):
        pass

    given = inputs()
    plain = Plain(config("bert")).eval()
    assert Plain.forward is TernaryBertModel.forward  # the fused one
    for derived in (Mine, Derived):
        model = derived(config("bert")).eval()
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            name, output = model(**given)
            assert name == "mine" and torch.equal(output[0], plain(**given)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "latent"])
def test_what_quantizers_learned_is_never_rounded_by_loading(quantizer, dtype, packed, tmp_path):
    bits = "1-1-4" if quantizer == "lsq" else "1-1-8"
    model = latent(family="binary", bits=bits, activation_quantizer=quantizer)
    for name, parameter in model.named_parameters():
        if "_quantizer." in name:
            parameter.data *= 1.001  # no number of 16 bits
    model = model.pack() if packed else model
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=dtype)
    learned = {name: tensor for name, tensor in model.state_dict().items() if "_quantizer." in name}
    assert learned and all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in learned.items())
    (loaded if packed else loaded.pack()).save_pretrained(tmp_path / "again")
    type(model).from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("backbone", ["bert", "roberta", "electra"])
@pytest.mark.parametrize(
    "fields", [{}, {"bits": "32-32-32"}, {"bits": "1-1-4", "activation_quantizer": "lsq"}], ids=["8", "32", "lsq"]
)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_of_four_dimensions_hide_what_those_of_two_hide(backbone, fields, kind):
    model = latent(backbone, family="binary" if "activation_quantizer" in fields else "ternary", **fields)
    given = inputs()
    real, expected = given["attention_mask"].bool(), answers(model, given)
    mask = real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for each in [model] if model.config.bits == "32-32-32" else [model, model.pack()]:
        for ids in (given["input_ids"], given["input_ids"].masked_fill(~real, 5)):
            with torch.no_grad():
                positions = torch.arange(real.shape[1]).expand_as(ids) + 2 * (backbone == "roberta")
                logits = each(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(logits.flatten(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
def test_eight_bit_codes_of_bfloat16_weights(granularity, tmp_path):
    """The largest weight of a range keeps its sign: in bfloat16 its code would round to 128."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SMALL)).bfloat16().save_pretrained(tmp_path / "plain")
    fields = {"bits": "8-8-8", "weight_granularity": granularity, "position_bits": 8}
    model = TernaryBertForSequenceClassification.from_pretrained(tmp_path / "plain", **fields)
    for name, layer in quantized_layers(model).items():
        found = layer.quantize_weight()
        assert layer.weight.dtype == torch.bfloat16
        assert bool(((found.dequantize() - layer.weight.float()).abs() <= 0.501 * found.scale).all()), name
    model.pack().save_pretrained(tmp_path / "packed")
    assert_same_codes(TernaryBertForSequenceClassification.from_pretrained(tmp_path / "packed"), model.pack())


def test_threads_keep_their_own_ranges_over_the_batch():
    """Sentences of one length but other padding in two threads of one model, each told its mask before either runs."""
    model = latent(activation_granularity="per_tensor").pack()
    given = [inputs(), inputs() | {"attention_mask": torch.ones(3, 11, dtype=torch.long)}]
    expected = [answers(model, one) for one in given]
    assert not torch.equal(*expected)
    barrier, found = threading.Barrier(2, timeout=60), {}

    def wait(*_) -> None:
        barrier.wait()

    model.bert.embeddings.register_forward_pre_hook(wait)
    threads = [
        threading.Thread(target=lambda which=which: found.update({which: answers(model, given[which])}))
        for which in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[which], expected[which]) for which in (0, 1))


@pytest.mark.parametrize("bits", ["2-2-8", "2-8-8"])
def test_latent_weights_of_half_precision(bits, tmp_path):
    """A checkpoint in fp16 stays so by default; zero rows and small ones have scales that fp16 cannot hold."""
    torch.manual_seed(0)
    plain = BertForSequenceClassification(BertConfig(**SMALL))
    rows = plain.bert.embeddings.word_embeddings.weight.data
    rows[7] = 0.001 * torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)
    plain.half().save_pretrained(tmp_path / "plain")
    model = TernaryBertForSequenceClassification.from_pretrained(tmp_path / "plain", bits=bits)
    embedding = model.bert.embeddings.word_embeddings
    assert embedding.weight.dtype == torch.float16 and not bool(embedding.weight[0].any())
    found = embedding(torch.tensor([0, 7]))
    assert found.dtype == torch.float16 and not bool(found[0].any())
    torch.testing.assert_close(found[1], embedding.weight[7], atol=1e-6, rtol=2e-3)
    packed = model.pack()
    packed.save_pretrained(tmp_path / "packed")
    assert_same_codes(TernaryBertForSequenceClassification.from_pretrained(tmp_path / "packed"), packed)


@pytest.mark.parametrize("backbone", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm"])
@pytest.mark.parametrize("quantizer", ["lat", "twn"])
def test_the_vocabulary_grows_and_shrinks(backbone, head, quantizer):
    model = latent(backbone, head, weight_quantizer=quantizer)
    given = {"input_ids": torch.tensor([[3, 5, 4]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        before = model(**given).logits
        model.tie_weights()
        for size, token in ((100, 99), (50, 49)):
            assert model.resize_token_embeddings(size) is model.get_input_embeddings()
            torch.testing.assert_close(model(**given).logits[..., :50], before[..., :50])
            model(input_ids=torch.tensor([[3, token, 4]]))
    packed = model.pack()
    assert_same_codes(packed, model)
    assert packed.resize_token_embeddings() is packed.get_input_embeddings()
    for other in (packed, latent(family="binary", bits="1-1-8", planes=2)):
        with pytest.raises(ValueError, match="packed or has two planes cannot be resized"):
            other.resize_token_embeddings(60)


@pytest.mark.parametrize("backbone", ["bert", "roberta"])
def test_dequantize_without_a_pooler(backbone):
    model = get_model_class("ternary", backbone, "base")(config(backbone), add_pooling_layer=False).eval()
    plain = model.pack().dequantize()
    assert plain.pooler is None and plain.get_input_embeddings().weight.unique().numel() > 1


def test_a_model_packed_after_training_in_mixed_precision_is_its_file(tmp_path):
    given = inputs()
    rows = [{"input_ids": ids, "labels": 0} for ids in given["input_ids"]]
    options = {"max_steps": 1, "use_cpu": True, "bf16": True, "report_to": "none", "save_strategy": "no"}
    trainer = Trainer(latent(), TrainingArguments(str(tmp_path / "run"), **options), train_dataset=rows)
    trainer.train()
    packed = trainer.model.pack()
    packed.save_pretrained(tmp_path / "packed")
    loaded = TernaryBertForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(answers(packed, given), answers(loaded, given))
