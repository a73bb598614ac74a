import shutil

import pytest
import torch
from tiny import EVERY_HEAD, latent, read_parts

from modeling_qbert import (
    CheckpointError,
    TernaryBertConfig,
    TernaryBertForSequenceClassification,
    checkpoint_report,
    format_report,
    verify_checkpoint,
)
from modeling_qbert.packing import PACKINGS


@pytest.mark.parametrize("backbone, head", EVERY_HEAD)
@pytest.mark.parametrize("bits", ["2-2-8", "2-8-8", "32-2-32"])
def test_every_byte_is_counted_once(backbone, head, bits, tmp_path):
    model = latent(backbone, head, bits=bits)
    model.pack("dense").save_pretrained(tmp_path)
    verify_checkpoint(tmp_path)
    report = checkpoint_report(tmp_path)
    assert report["bytes"] == sum(report["parts"].values()) == (tmp_path / "model.safetensors").stat().st_size
    assert report["parameters"] == sum(p.numel() for p in model.parameters())  # a tied decoder counts once
    assert report["fp32_bytes"] == 4 * report["parameters"]
    header, _ = read_parts(tmp_path / "model.safetensors")
    stored = {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    parts = report["parts"]
    assert parts["scales"] == sum(size for name, size in stored.items() if name.endswith("weight_scale"))
    assert parts["word embedding"] == sum(s for n, s in stored.items() if n.endswith("word_embeddings.weight"))
    packed_encoder = [name for name, entry in header.items() if ".layer." in name and entry["dtype"] == "U8"]
    assert bool(packed_encoder) == bits.startswith("2")
    if packed_encoder:
        assert parts["encoder"] == sum(stored[name] for name in packed_encoder)
    assert (head == "base") == (parts["head"] == 0)
    text = format_report(tmp_path)
    assert f"{report['bytes']:,}" in text and "MB" in text and "MiB" in text


@pytest.fixture(scope="module")
def bert_base():
    """A packed classifier of BERT-base's shape. 440 MB of latent weights are freed before a test runs."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = TernaryBertForSequenceClassification(TernaryBertConfig())
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    return model.pack()


@pytest.mark.parametrize("packing, limit", [("2bit", 29_600_000), ("dense", 24_600_000)])
def test_bert_base_fits(bert_base, packing, limit, tmp_path):
    bert_base.pack(packing).save_pretrained(tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix != ".py")  # the code travels along
    assert files <= limit
    verify_checkpoint(tmp_path)
    report = checkpoint_report(tmp_path)
    assert report["bytes"] <= files and report["MB"] == report["bytes"] / 1e6
    assert report["parameters"] == 109_482_240 + 2 * 768 + 2
    assert report["parts"]["encoder"] >= 85_000_000 / 5
    assert report["papers"]["fp32_MiB"] == pytest.approx(417.64, abs=0.02)
    assert report["papers"]["MiB"] == pytest.approx(27.95, abs=0.02)  # the papers' 28.0, row scales left out
    assert report["papers"]["ratio"] == pytest.approx(14.9, abs=0.1)
    assert report["ratio"] > 14.8


def test_verify_names_what_is_wrong(tmp_path):
    model = latent()
    model.pack().save_pretrained(tmp_path / "good")
    with pytest.raises(CheckpointError, match="config.json"):
        verify_checkpoint(tmp_path / "absent")
    model.save_pretrained(tmp_path / "latent")
    with pytest.raises(CheckpointError, match="latent/config.json.*quantization_config"):
        verify_checkpoint(tmp_path / "latent")
    for packing in PACKINGS[1:]:
        shutil.copytree(tmp_path / "good", tmp_path / "mixed")
        model.pack(packing).save_pretrained(tmp_path / packing)
        shutil.copy(tmp_path / packing / "model.safetensors", tmp_path / "mixed")
        with pytest.raises(CheckpointError, match="mixed/model.safetensors"):
            verify_checkpoint(tmp_path / "mixed")
