"""A packed MiniLM as an embedding model of sentence-transformers: encode, save, reload, exactly the same vectors."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from modeling_qbert import verify_checkpoint


TEXTS = [
    "a gripping, funny film",
    "two hours that feel like four",
    "The committee approved the plan on Monday.",
    "short",
    "",
]


@pytest.fixture
def embedder(trained):
    backbone = Transformer(str(trained), max_seq_length=64)
    width = backbone.get_embedding_dimension()
    return SentenceTransformer(modules=[backbone, Pooling(width, "mean"), Normalize()], device="cpu")


def test_vectors_are_the_mean_of_the_packed_models_tokens(embedder, trained):
    model, tokenizer = AutoModel.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert embedder[0].auto_model.is_packed
    found = embedder.encode(TEXTS, batch_size=len(TEXTS))
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert found.shape == (5, 384) and np.abs(found[0] - found[2]).max() > 0.01


def test_save_and_reload_are_exact(embedder, trained, tmp_path):
    expected = embedder.encode(TEXTS)
    embedder.save_pretrained(str(tmp_path / "one"))
    weights = tmp_path / "one/model.safetensors"
    verify_checkpoint(tmp_path / "one")
    assert weights.stat().st_size <= (trained / "model.safetensors").stat().st_size
    reloaded = SentenceTransformer(str(tmp_path / "one"), device="cpu")
    assert reloaded[0].auto_model.is_packed and reloaded.max_seq_length == 64
    assert np.array_equal(reloaded.encode(TEXTS), expected)
    reloaded.save_pretrained(str(tmp_path / "two"))
    assert (tmp_path / "two/model.safetensors").read_bytes() == weights.read_bytes()
    assert json.loads((tmp_path / "two/modules.json").read_text())[0]["type"].endswith("Transformer")


def test_a_sentence_keeps_its_vector_in_any_batch(embedder):
    alone = np.stack([embedder.encode([text])[0] for text in TEXTS])
    np.testing.assert_allclose(embedder.encode(TEXTS, batch_size=5), alone, atol=1e-5)


def test_similarity_and_half_precision(embedder):
    vectors = embedder.encode(TEXTS[:3], convert_to_tensor=True)
    similarity = embedder.similarity(vectors, vectors)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3), atol=1e-5, rtol=0)
    codes = embedder[0].auto_model.encoder.layer[0].attention.self.query.weight.clone()
    halved = embedder.to(torch.bfloat16).encode(TEXTS[:3], convert_to_tensor=True)
    assert (torch.nn.functional.cosine_similarity(halved.float(), vectors.float()) > 0.97).all()
    assert torch.equal(embedder[0].auto_model.encoder.layer[0].attention.self.query.weight, codes)
