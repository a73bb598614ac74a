"""What a prediction may depend on, what inputs are refused, and what runs a model: pipelines, compilers, threads."""

import threading

import pytest
import torch
from tiny import EVERY_HEAD, answers, inputs, latent
from transformers import BertTokenizer, pipeline

from modeling_qbert import TernaryBertForSequenceClassification
from modeling_qbert.layers import QuantLinear
from modeling_qbert.modeling_ternary import HEADS


SETTINGS = (
    [
        {"bits": bits, "activation_quantizer": activation, "weight_granularity": granularity}
        for bits, activation, granularity in [
            ("2-2-8", "asymmetric", "per_tensor"),
            ("2-2-8", "symmetric", "per_group"),
            ("2-2-4", "asymmetric", "per_row"),
            ("8-8-4", "symmetric", "per_tensor"),
            ("2-2-32", "symmetric", "per_row"),
            ("32-32-32", "symmetric", "per_row"),
        ]
    ]
    + [
        {"family": "binary", "bits": bits, "activation_quantizer": activation, "weight_granularity": granularity}
        for bits, activation, granularity in [
            ("1-1-8", "asymmetric", "per_tensor"),
            ("1-1-4", "lsq", "per_row"),
            ("1-1-8", "lsq", "per_tensor"),
            ("1-1-8", "pact", "per_tensor"),
        ]
    ]
    + [{"family": "ghost", "bits": bits} for bits in ("32-32-32", "2-2-8")]
)


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def padded(sentences, width, token=0):
    ids = torch.full((len(sentences), width), token)
    mask = torch.zeros(len(sentences), width, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
    return ids, mask


@pytest.fixture(scope="module")
def sentences():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 97, (length,), generator=generator) for length in (11, 3, 1, 20, 7)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("backbone", HEADS)
def test_a_sentence_has_one_answer(backbone, setting, packed, sentences):
    """Alone, padded, in any batch, in any order, with anything in the padding."""
    model = latent(backbone, **setting)
    if packed:
        if setting["bits"] == "32-32-32":
            pytest.skip("full precision has nothing to pack")
        model = model.pack()
    pad = model.config.pad_token_id
    alone = torch.cat([logits(model, sentence.view(1, -1)) for sentence in sentences])
    close = {"atol": 1e-5, "rtol": 1e-5}
    for width in (20, 33):
        ids, mask = padded(sentences, width, pad)
        torch.testing.assert_close(logits(model, ids, mask), alone, **close)
        noise = torch.where(mask.bool(), ids, 50) if backbone != "roberta" else ids  # RoBERTa counts positions by pad
        torch.testing.assert_close(logits(model, noise, mask), alone, **close)
        order = [3, 1, 4, 0, 2]
        torch.testing.assert_close(logits(model, ids[order], mask[order]), alone[order], **close)
        torch.testing.assert_close(logits(model, ids[1:3], mask[1:3]), alone[1:3], **close)
    torch.testing.assert_close(logits(model, ids, mask.bool()), alone, **close)
    additive = torch.where(mask.bool(), 0.0, -10_000.0)[:, None, None, :].expand(-1, 1, 33, -1)
    torch.testing.assert_close(logits(model, ids, additive), alone, **close)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backbone", HEADS)
@pytest.mark.parametrize("activation", ["symmetric", "asymmetric"])
def test_padding_widens_no_range_over_the_batch(backbone, activation, packed, sentences):
    model = latent(backbone, activation_granularity="per_tensor", activation_quantizer=activation)
    model = model.pack() if packed else model
    pad = model.config.pad_token_id
    narrow, wide = padded(sentences, 20, pad), padded(sentences, 33, pad)
    expected = logits(model, *narrow)
    torch.testing.assert_close(logits(model, *wide), expected, atol=1e-5, rtol=1e-5)
    if backbone != "roberta":  # RoBERTa counts positions by its pad token
        noise = torch.where(wide[1].bool(), wide[0], torch.arange(33))
        torch.testing.assert_close(logits(model, noise, wide[1]), expected, atol=1e-5, rtol=1e-5)
    alone = logits(model, sentences[1].view(1, -1))
    assert not torch.allclose(alone[0], expected[1], atol=1e-5)  # the papers' setting: neighbours do count


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_that_no_model_can_take(packed):
    model = latent()
    model = model.pack() if packed else model
    ids = torch.full((2, 5), 7)

    def given(value):
        changed = ids.clone()
        changed[1, 3] = value
        return changed

    for wrong, text in [
        (given(97), r"\[0, 96\].*found 97"),
        (given(2**31), "found 2147483648"),
        (given(-1), "found -1"),
        (ids.float(), "float32"),
        (ids.bool(), "bool"),
        (ids.to(torch.uint8), "uint8"),
        (ids[:, :0], r"found \[2, 0\]"),
        (ids[:0], r"found \[0, 5\]"),
        (ids[0], r"found \[5\]"),
        (torch.full((1, 41), 7), "41 tokens.*40 positions"),
    ]:
        with pytest.raises(ValueError, match=text):
            logits(model, wrong)
    for mask in (torch.ones(2, 4), torch.ones(1, 5), torch.ones(2, 6)):
        with pytest.raises(ValueError, match="attention_mask"):
            logits(model, ids, mask)
    assert torch.isfinite(logits(model, torch.full((1, 40), 7))).all()
    assert torch.equal(logits(model, ids.int()), logits(model, ids))
    with torch.no_grad():
        vectors = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=vectors).logits, logits(model, ids))
        with pytest.raises(ValueError, match="found"):
            model(inputs_embeds=vectors[:, :0])


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
@pytest.mark.parametrize("bits", ["2-2-8", "32-32-32"])
def test_hidden_states_and_attentions_come_when_asked_for(backbone, head, bits):
    model, given = latent(backbone, head, bits=bits), inputs(head)
    for state in (model, model.train(), *([] if bits == "32-32-32" else [model.pack()])):
        with torch.no_grad():
            state(**given)
            outputs = state(**given, output_hidden_states=True, output_attentions=True)
        assert len(outputs.hidden_states) == 3
        assert len(outputs.attentions) == (0 if bits == "32-32-32" else 2)  # Transformers' sdpa gives none


def test_the_last_positions_of_roberta():
    model = latent("roberta")  # two positions go to the pad token's offset
    assert torch.isfinite(logits(model, torch.full((1, 38), 7))).all()
    with pytest.raises(ValueError, match="39 tokens.*38 positions"):
        logits(model, torch.full((1, 39), 7))


@pytest.mark.parametrize("over", ["per_token", "per_tensor"])
@pytest.mark.parametrize("backbone", HEADS)
def test_an_all_zero_mask_gives_finite_answers(backbone, over):
    model = latent(backbone, activation_granularity=over).pack()
    ids = torch.full((2, 5), 7)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    assert torch.isfinite(logits(model, ids, mask)).all()
    assert torch.isfinite(logits(model, ids, torch.zeros_like(mask))).all()


VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad film a funny dull un ##wise .".split()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pipeline(dtype, tmp_path):
    vocabulary = VOCABULARY + [f"word{n}" for n in range(97 - len(VOCABULARY))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=40)
    model = latent(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    model.pack().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    classify = pipeline("text-classification", model=str(tmp_path / "model"), dtype=dtype, device="cpu")
    assert classify.model.is_packed and str(classify.model.dtype) == f"torch.{dtype}"
    texts = ["a good film .", "dull", "", "unwise " * 100, "\0\u202e🙂"]
    together = classify(texts, batch_size=5, truncation=True, top_k=None)
    for text, found in zip(texts, together):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits.softmax(-1)[0]
        for row in found:
            wanted = expected[model.config.label2id[row["label"]]].item()
            assert row["score"] == pytest.approx(wanted, abs=1e-5 if dtype == "float32" else 0.1)
    with pytest.raises(ValueError, match="40 positions"):
        classify("unwise " * 100)


COMPILED = [("bert", "2-2-8"), ("roberta", "2-2-8"), ("electra", "2-8-4"), ("bert", "2-2-32")]


@pytest.mark.parametrize("backbone, bits", COMPILED)
def test_export(backbone, bits):
    model = latent(backbone, bits=bits).pack()
    given = inputs()
    with torch.no_grad():
        expected = model(**given).logits
        program = torch.export.export(model, (), given)
        found = program.module()(**given).logits
        other = inputs(seed=9)
        torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    stored = [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.uint8]
    assert len(stored) == 14  # the word embedding, twelve encoder layers and the pooler stay packed


@pytest.mark.parametrize("backbone, bits", COMPILED[:1])
def test_compile(backbone, bits):
    model = latent(backbone, bits=bits).pack()
    given = inputs()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(compiled(**given).logits, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises((ValueError, IndexError)):
        logits(model, given["input_ids"] + 97)
    torch._dynamo.reset()


def test_models_and_threads():
    models = [latent(backbone, seed=seed).pack() for seed, backbone in enumerate(HEADS)]
    given = [inputs(seed=seed) for seed in range(4)]
    expected = [[answers(model, one) for one in given] for model in models]
    fresh = [latent(backbone, seed=seed).pack() for seed, backbone in enumerate(HEADS)]  # nothing cached yet
    wrong = []

    def work(seed):
        for turn in range(12):
            which, one = (turn + seed) % len(fresh), (turn * seed + turn) % 4
            if not torch.equal(answers(fresh[which], given[one]), expected[which][one]):
                wrong.append((which, one))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_gradient_mode_agree():
    for model in (latent(), latent().pack()):
        given = inputs()
        expected = answers(model, given)
        with torch.inference_mode():
            assert torch.equal(answers(model, given), expected)
        assert torch.equal(model(**given).logits.detach().flatten(), expected)
        assert torch.equal(answers(model, given), expected)


def test_a_changed_input_is_quantized_again():
    """Query, key and value share one quantized input; the next input must not meet it."""
    model = latent()
    first = next(module for module in model.modules() if isinstance(module, QuantLinear)).eval()
    x = torch.randn(1, 3, 36)
    with torch.no_grad():
        one = first(x)
        x.mul_(-2)
        assert not torch.allclose(first(x), one)
        expected = first(x.clone())
        assert torch.equal(first(x), expected)


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
def test_gradients_reach_every_weight(backbone, head):
    model = latent(backbone, head, weight_quantizer="lat").train()
    output = model(**inputs(head), return_dict=True).to_tuple()
    sum((part.float() ** 2).mean() for part in output).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
    assert not without
    zero = {name for name, p in model.named_parameters() if not p.grad.any() and not name.endswith("key.bias")}
    assert not zero - {"classifier.bias"}


def test_two_latent_steps_change_codes():
    model = latent("bert", "sequence-classification").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: m.quantize_weight().codes for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    model(**inputs(), labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    after = {name: m.quantize_weight().codes for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert isinstance(model, TernaryBertForSequenceClassification)
