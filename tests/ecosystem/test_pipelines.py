"""`transformers.pipeline` on packed checkpoints of every family: its answers are the model's."""

import pytest
import torch
from transformers import BertTokenizer, pipeline
from zoo import FAMILIES, build


WORDS = ["ada", "wrote", "notes", "in", "london", "and", "paris"]
TEXTS = ["ada wrote notes", "notes in london and paris"]


def saved(folder, family, head):
    """(model, tokenizer, folder that holds both)."""
    model = build(family, "bert", head, state="packed", num_hidden_layers=1, num_labels=3)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    vocabulary |= {f"[unused{index}]": index for index in range(len(vocabulary), model.config.vocab_size)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, str(folder)


@torch.no_grad()
def output(model, tokenizer, text):
    return model(**tokenizer(text, return_tensors="pt"))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_classification(family, batch_size, tmp_path):
    model, tokenizer, folder = saved(tmp_path, family, "sequence-classification")
    found = pipeline("text-classification", model=folder, top_k=None)(TEXTS, batch_size=batch_size)
    for text, rows in zip(TEXTS, found):
        scores = output(model, tokenizer, text).logits[0].softmax(-1)
        assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in rows} == {
            model.config.id2label[index]: float(score) for index, score in enumerate(scores)
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_token_classification(family, tmp_path):
    model, tokenizer, folder = saved(tmp_path, family, "token-classification")
    found = pipeline("token-classification", model=folder, ignore_labels=[])(TEXTS[1])
    scores = output(model, tokenizer, TEXTS[1]).logits[0, 1:-1].softmax(-1)
    assert [row["word"] for row in found] == TEXTS[1].split()
    assert [row["entity"] for row in found] == [model.config.id2label[int(row.argmax())] for row in scores]
    assert [row["score"] for row in found] == pytest.approx(scores.amax(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fill_mask(family, tmp_path):
    model, tokenizer, folder = saved(tmp_path, family, "masked-lm")
    best = pipeline("fill-mask", model=folder)("ada wrote [MASK]")[0]
    scores = output(model, tokenizer, "ada wrote [MASK]").logits[0, 3].softmax(-1)
    assert best["token"] == int(scores.argmax()) and best["score"] == pytest.approx(float(scores.max()), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_feature_extraction(family, tmp_path):
    model, tokenizer, folder = saved(tmp_path, family, "base")
    (found,) = pipeline("feature-extraction", model=folder, return_tensors=True)([TEXTS[0]])
    torch.testing.assert_close(found, output(model, tokenizer, TEXTS[0]).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_zero_shot_classification(tmp_path):
    model, tokenizer, folder = saved(tmp_path, "ternary", "sequence-classification")
    ids = {"contradiction": 0, "entailment": 1, "neutral": 2}
    model.config.label2id, model.config.id2label = ids, {index: name for name, index in ids.items()}
    model.save_pretrained(folder)
    ask = pipeline("zero-shot-classification", model=folder)
    found = ask(TEXTS[0], candidate_labels=["london", "paris"], hypothesis_template="in {}")
    with torch.no_grad():
        batch = tokenizer([TEXTS[0]] * 2, ["in london", "in paris"], return_tensors="pt")
        scores = model(**batch).logits[:, 1].softmax(0)
    assert dict(zip(found["labels"], found["scores"])) == pytest.approx(
        {"london": float(scores[0]), "paris": float(scores[1])}, abs=1e-5
    )
