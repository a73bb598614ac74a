"""Adapters of peft on quantized layers: trained, saved, loaded again, never lost; packed models alone do not train."""

import warnings

import pytest
import torch
from datasets import load_dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import answers, inputs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from zoo import BACKBONES, build

from modeling_qbert.layers import PackedEmbedding, PackedLinear
from modeling_qbert.lora_layer import LoraQuantizedLinear


STATES = [(family, backbone, state) for family, backbone in BACKBONES for state in ("latent", "packed")]


def lora(**options):
    """What a user writes for any BERT."""
    return LoraConfig(**{"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 2, **options})


def train(model, steps=15, rate=0.02):
    """A plain loop; returns the losses."""
    model.train()
    given, labels = inputs(), torch.tensor([0, 1, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**given, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("family, backbone, state", STATES)
def test_round_trip(family, backbone, state, tmp_path):
    model, given = build(family, backbone, state=state), inputs()
    expected = answers(model, given)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tuned = get_peft_model(model, lora())
    layers = [module for module in tuned.modules() if isinstance(module, LoraQuantizedLinear)]
    assert len(layers) == 2 * model.config.num_hidden_layers
    assert torch.equal(answers(tuned.eval(), given), expected)  # a new adapter adds nothing
    losses = train(tuned)
    assert losses[-1] < losses[0]
    found = answers(tuned, given)
    assert not torch.equal(found, expected)
    with tuned.disable_adapter():
        assert torch.equal(answers(tuned, given), expected)
    tuned.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(family, backbone, state=state), tmp_path)
    assert torch.equal(answers(reloaded.eval(), given), found)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        if not name.startswith("classifier."):  # the task type trains the classifier beside the adapters
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_what_would_lose_an_adapter_is_refused(state, tmp_path):
    model, given = build("ternary", "bert", state=state), inputs()
    expected = answers(model, given)
    tuned = get_peft_model(model, lora(task_type=None))
    train(tuned)
    found = answers(tuned, given)
    for merge in (tuned.merge_and_unload, tuned.merge_adapter, lambda: tuned.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="cannot be merged into quantized weights"):
            merge()
    for action in ("pack", "dequantize", "save"):
        call = getattr(model, action, lambda: model.save_pretrained(tmp_path))
        with pytest.raises(ValueError, match=rf"query holds an adapter; to {action} the model"):
            call()
    assert torch.equal(answers(tuned, given), found) and not list(tmp_path.iterdir())
    plain = tuned.unload()
    assert torch.equal(answers(plain, given), expected)
    plain.save_pretrained(tmp_path)
    assert torch.equal(answers(type(model).from_pretrained(tmp_path), given), expected)


@pytest.mark.parametrize(
    "config, text",
    [
        (lora(use_dora=True), "quantized layers take plain LoRA"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (lora(target_modules=["word_embeddings"]), "LoRA on PackedEmbedding is not supported"),
        (IA3Config(target_modules=["query"], feedforward_modules=[]), "PackedLinear.*is not supported"),
    ],
    ids=["dora", "pissa", "olora", "embedding", "ia3"],
)
def test_what_needs_a_float_weight_is_refused(config, text):
    model = build("ternary", "bert", state="packed")
    codes = [module.weight.clone() for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    with pytest.raises(ValueError, match=text):
        get_peft_model(model, config)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    assert all(torch.equal(layer.weight, code) for layer, code in zip(layers, codes))


def test_several_adapters_and_every_linear_layer(tmp_path):
    """Named adapters are added and switched; a quantized tied decoder takes one too."""
    model, given = build("ternary", "bert", "masked-lm", "packed"), inputs()
    names = ["query", "key", "value", "dense", "decoder"]
    tuned = get_peft_model(model, lora(target_modules=names, task_type=None, init_lora_weights=False), "one").eval()
    first = answers(tuned, given)
    tuned.add_adapter("two", lora(target_modules=["value"], task_type=None, init_lora_weights=False, lora_dropout=0.1))
    assert torch.equal(answers(tuned, given), first)
    tuned.set_adapter("two")
    second = answers(tuned.eval(), given)
    assert not torch.equal(first, second)
    tuned.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build("ternary", "bert", "masked-lm", "packed"), tmp_path / "one", "one")
    reloaded.load_adapter(tmp_path / "two", "two")
    assert torch.equal(answers(reloaded.eval(), given), first)
    reloaded.set_adapter("two")
    assert torch.equal(answers(reloaded, given), second)


def test_kbit_preparation_and_gradient_checkpointing():
    model = build("ternary", "bert", state="packed").to(torch.bfloat16)
    prepared = prepare_model_for_kbit_training(model)
    assert {tensor.dtype for tensor in prepared.state_dict().values()} == {torch.uint8, torch.float32}
    tuned = get_peft_model(prepared, lora())
    losses = train(tuned)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("peft_first", [True, False])
def test_peft_may_be_imported_before_or_after(fresh_process, peft_first):
    """And whoever attaches no adapter never pays for it."""
    fresh_process("lora_imports.py", *(["peft"] if peft_first else []))


# Trained weights


@pytest.fixture(scope="module")
def sentences():
    folder = "examples/data/rotten_tomatoes"
    return load_dataset("parquet", data_files=f"{folder}/validation.parquet", split="train").shuffle(seed=0)


@pytest.fixture
def rows(sentences, trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    swapped = sentences.select(range(64)).map(lambda row: {"label": 1 - row["label"]})  # what the model never said
    return tokenizer, swapped.map(lambda row: tokenizer(row["text"], truncation=True, max_length=48))


def trainer(model, rows, folder, **options):
    tokenizer, data = rows
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        **options,
    )
    return Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data, processing_class=tokenizer)


def test_a_packed_model_alone_does_not_train(trained, rows, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(model, rows, tmp_path)


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}], ids=["none", "auto", "cpu"])
def test_trained_weights_learn_by_adapters(trained, rows, tmp_path, device_map):
    tokenizer, data = rows
    batch = DataCollatorWithPadding(tokenizer)([{"input_ids": row["input_ids"]} for row in data])
    model = AutoModelForSequenceClassification.from_pretrained(trained, device_map=device_map)
    with torch.no_grad():
        expected = model(**batch).logits
    tuned = get_peft_model(model, lora(r=8))
    training = trainer(tuned, rows, tmp_path / "run", save_strategy="steps", save_steps=8)
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    tuned.eval()
    with torch.no_grad():
        found = tuned(**batch).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(**batch).logits, expected)
    checkpoint = tmp_path / "run/checkpoint-8"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 1_000_000
    base = AutoModelForSequenceClassification.from_pretrained(trained, device_map=device_map)
    reloaded = PeftModel.from_pretrained(base, checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, found)
    with pytest.raises(ValueError, match="cannot be merged"):
        reloaded.merge_and_unload()


def test_adapters_without_a_wrapper(trained, rows, tmp_path):
    """`add_adapter` of Transformers: the model stays itself, saves its adapter alone and finds its base again."""
    tokenizer, data = rows
    batch = DataCollatorWithPadding(tokenizer)([{"input_ids": row["input_ids"]} for row in data.select(range(16))])
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    model.add_adapter(LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    trainer(model, rows, tmp_path / "run", save_strategy="no").train()
    with torch.no_grad():
        found = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    base = AutoModelForSequenceClassification.from_pretrained(trained)
    base.load_adapter(str(tmp_path / "adapter"))
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        for reloaded in (base, whole):
            assert torch.equal(reloaded.eval()(**batch).logits, found)
