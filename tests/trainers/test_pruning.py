import copy
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distillation import Gradients, collate, make_rows
from test_run import TINY, make_backbone, make_data
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
    set_seed,
)

from modeling_qbert import BinaryBertForMaskedLM, BinaryBertForSequenceClassification, BinaryBertModel, get_model_class
from trainers import cli
from trainers.distillation import DistillationArguments
from trainers.losses import hidden_states_loss, logits_loss
from trainers.pruning import (
    Importance,
    WidthAdaptiveTrainer,
    cut,
    head_and_neuron_importance,
    load_full_precision,
    rewire,
    subnetwork,
)
from trainers.recipe import Recipe
from trainers.run import run_recipe


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

# 12 heads of 4, and 50 neurons, no multiple of 12
SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 50,
    "vocab_size": 99,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PLAIN = {
    "bert": BertForSequenceClassification,
    "roberta": RobertaForSequenceClassification,
    "electra": ElectraForSequenceClassification,
}
EXTRA = {"electra": {"embedding_size": 20}}  # ELECTRA projects its embeddings
BACKBONES = list(PLAIN)


@torch.no_grad()
def randomize(model, seed):
    """Weights so large that every head and neuron shows in the answer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def make_model(backbone="bert", seed=1, **config):
    """Model of a low-bit class, in full precision unless `bits` says otherwise."""
    set_seed(seed)
    cls = get_model_class("binary", backbone, "sequence-classification")
    fields = {"bits": "32-32-32", **SHAPE, **EXTRA.get(backbone, {}), **config}
    return randomize(cls(cls.config_class(**fields)), seed)


def make_teacher(backbone="bert", seed=2, **config):
    set_seed(seed)
    cls = PLAIN[backbone]
    return randomize(cls(cls.config_class(**{**SHAPE, **EXTRA.get(backbone, {}), **config})), seed)


def batches(count=2, rows=6):
    return [collate(make_rows(rows, seed=seed)) for seed in range(count)]


@torch.no_grad()
def logits(model, batch):
    return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def rewired(model, importance):
    other = copy.deepcopy(model)
    other.load_state_dict(rewire(model.state_dict(), model.config, importance))
    return other


def random_importance(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Importance(torch.rand(2, 12, generator=generator), torch.rand(2, 50, generator=generator))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_importance_is_the_formula_on_parameter_gradients(backbone):
    model = make_model(backbone).double()
    given = batches(2)
    importance = head_and_neuron_importance(model.train(), given)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for layer in model.base_model.encoder.layer for module in layer.modules())
    model.eval()
    heads, neurons = torch.zeros(2, 12), torch.zeros(2, 50)
    for batch in given:
        model.zero_grad()
        model(**batch).loss.backward()
        for index, layer in enumerate(model.base_model.encoder.layer):
            output, first, second = layer.attention.output.dense.weight, layer.intermediate.dense, layer.output.dense
            heads[index] += (output * output.grad).sum(0).view(12, 4).sum(-1).abs().float()
            one = (first.weight * first.weight.grad).sum(1) + first.bias * first.bias.grad
            two = (second.weight * second.weight.grad).sum(0)
            neurons[index] += (one.abs() + two.abs()).float()
    assert heads.min() > 0 and neurons.max() > 0
    torch.testing.assert_close(importance.heads, heads, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(importance.neurons, neurons, rtol=1e-4, atol=1e-7)


def test_importance_adds_absolute_values_of_separate_batches():
    model = make_model()
    given = batches(3)
    together = head_and_neuron_importance(model, given)
    alone = [head_and_neuron_importance(model, [batch]) for batch in given]
    torch.testing.assert_close(together.heads, sum(one.heads for one in alone))
    torch.testing.assert_close(together.neurons, sum(one.neurons for one in alone))
    again = head_and_neuron_importance(model, reversed(given))
    torch.testing.assert_close(together.neurons, again.neurons)


def test_frozen_models_have_importance_too():
    model = make_model()
    expected = head_and_neuron_importance(model, batches(1))
    with torch.no_grad():
        found = head_and_neuron_importance(model.requires_grad_(False), batches(1))
    torch.testing.assert_close(found.heads, expected.heads)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_planted_useless_heads_and_neurons_are_found(backbone):
    model = make_model(backbone)
    heads = [[0, 2, 3, 7, 8, 11], [1, 2, 4, 5, 6, 9]]
    neurons = [list(range(0, 50, 2)), list(range(25))]
    with torch.no_grad():
        for layer, dead_heads, dead_neurons in zip(model.base_model.encoder.layer, heads, neurons):
            layer.attention.output.dense.weight.view(48, 12, 4)[:, dead_heads] *= 1e-4
            layer.output.dense.weight[:, dead_neurons] *= 1e-4
    importance = head_and_neuron_importance(model, batches())
    for index in range(2):
        assert sorted(importance.heads[index].argsort()[:6].tolist()) == heads[index]
        assert sorted(importance.neurons[index].argsort()[:25].tolist()) == neurons[index]
    half = subnetwork(rewired(model, importance), 0.5)
    batch = batches(1, rows=16)[0]
    torch.testing.assert_close(logits(half, batch), logits(model, batch), rtol=0, atol=5e-3)
    worst = Importance(1 - importance.heads, 1 - importance.neurons)
    difference = logits(subnetwork(rewired(model, worst), 0.5), batch) - logits(model, batch)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rewired_is_the_same_network(backbone):
    model = make_model(backbone)
    importance = random_importance()
    other = rewired(model, importance)
    batch = batches(1, rows=16)[0]
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=0, atol=1e-5)
    moved = {name for name, value in other.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    parts = ("self.query", "self.key", "self.value", "output.dense.weight", "intermediate.dense")
    assert all(any(part in name for part in parts) for name in moved)
    assert len(moved) == 2 * 10
    again = head_and_neuron_importance(other, batches())
    expected = head_and_neuron_importance(model, batches())
    order = importance.heads.argsort(dim=-1, descending=True)
    torch.testing.assert_close(again.heads, expected.heads.gather(-1, order), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("width, heads, neurons", [(1 / 12, 1, 4), (0.5, 6, 25), (9 / 12, 9, 37), (1.0, 12, 50)])
def test_cut_is_the_full_network_with_the_rest_masked(backbone, width, heads, neurons, tmp_path):
    model = make_model(backbone)
    narrow = subnetwork(model, width)
    config = narrow.config
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (heads, 4, neurons)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer in masked.base_model.encoder.layer:
            layer.attention.output.dense.weight[:, 4 * heads :] = 0
            layer.output.dense.weight[:, neurons:] = 0
    batch = batches(1, rows=16)[0]
    expected = logits(masked, batch)
    torch.testing.assert_close(logits(narrow, batch), expected, rtol=0, atol=1e-5)
    if width < 1:
        assert (expected - logits(model, batch)).abs().max() > 0.05

    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded, batch), logits(narrow, batch), rtol=0, atol=0)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    changed = {name for name, value in stored.items() if value.shape != model.state_dict()[name].shape}
    assert len(changed) == (2 * 10 if width < 1 else 0)
    for name in stored.keys() - changed:
        assert torch.equal(stored[name], model.state_dict()[name])


def test_a_sub_network_of_a_sub_network():
    model = make_model()
    batch = batches(1)[0]
    direct, twice = subnetwork(model, 0.25), subnetwork(subnetwork(model, 0.5), 0.5)
    torch.testing.assert_close(logits(twice, batch), logits(direct, batch), rtol=0, atol=1e-6)


def test_what_is_cut_has_memory_of_its_own():
    model = make_model()
    state, _ = cut(model.state_dict(), model.config, 0.5)
    for name, value in state.items():
        assert value.is_contiguous()
        if value.shape != model.state_dict()[name].shape:
            assert value.untyped_storage().nbytes() == value.nbytes


def test_tied_decoder_stays_tied(tmp_path):
    set_seed(1)
    shape = SHAPE | {"bits": "32-32-32"}
    model = randomize(BinaryBertForMaskedLM(BinaryBertForMaskedLM.config_class(**shape)), 1)
    state = rewire(model.state_dict(), model.config, random_importance())
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    batch = batches(1)[0]
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=0, atol=1e-5)
    narrow = subnetwork(other, 0.5)
    assert narrow.get_output_embeddings().weight is narrow.get_input_embeddings().weight
    narrow.save_pretrained(tmp_path)
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    plain = randomize(BertForMaskedLM(BertConfig(**SHAPE)), 1)
    assert rewire(plain.state_dict(), plain.config, random_importance()).keys() == plain.state_dict().keys()


def test_backbone_without_head():
    for model in (BinaryBertModel(make_model().config), make_model().bert):
        narrow = subnetwork(model, 0.5)
        assert narrow.encoder.layer[0].attention.self.query.weight.shape == (24, 48)
    with pytest.raises(ValueError, match="bits 32-32-32, found .*BertModel"):
        subnetwork(make_teacher().bert, 0.5)


def test_strict_about_names_and_shapes():
    model = make_model()
    state, config = model.state_dict(), model.config
    name = "bert.encoder.layer.1.intermediate.dense.bias"
    with pytest.raises(ValueError, match=f"missing .'{name}'"):
        cut({key: value for key, value in state.items() if key != name}, config, 0.5)
    extra = state | {"bert.encoder.layer.1.attention.self.query.weight_scale": torch.zeros(1)}
    with pytest.raises(ValueError, match="unknown .'bert.encoder.layer.1.attention.self.query.weight_scale'"):
        rewire(extra, config, random_importance())
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(50,\), found \(2, 50\)"):
        cut(state | {name: torch.zeros(2, 50)}, config, 0.5)
    with pytest.raises(ValueError, match="one encoder"):
        cut({"classifier.weight": torch.zeros(2, 48)}, config, 0.5)
    with pytest.raises(ValueError, match="importance: expected scores of shape"):
        rewire(state, config, Importance(torch.zeros(2, 6), torch.zeros(2, 50)))
    for width in (0, 1.5, -0.5, float("nan")):
        with pytest.raises(ValueError, match="width: expected a number above 0 and at most 1"):
            cut(state, config, width)
    with pytest.raises(ValueError, match="0.01 of 12 heads and 50 neurons leaves 0 and 0"):
        cut(state, config, 0.01)


def test_what_importance_refuses():
    model = make_model()
    unlabelled = {name: value for name, value in batches(1)[0].items() if name != "labels"}
    with pytest.raises(ValueError, match="importance needs labels, found a batch of"):
        head_and_neuron_importance(model, [unlabelled])
    with pytest.raises(ValueError, match="at least one batch"):
        head_and_neuron_importance(model, [])
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="heads are not finite"):
        head_and_neuron_importance(model, batches(1))
    assert not model.bert.encoder.layer[0].output.dense._forward_pre_hooks


class InOrder(WidthAdaptiveTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset)


WIDTHS = [1.0, 0.75, 0.5, 1 / 12]


def make_trainer(folder, student, teacher, *, widths=WIDTHS, rows=None, callbacks=None, extra_padding=0, **args):
    settings = {
        "logits_weight": 1.0,
        "hidden_states_weight": 0.1,
        "attention_scores_weight": 0.0,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **args,
    }
    rows = make_rows() if rows is None else rows
    return InOrder(
        student,
        teacher,
        DistillationArguments(output_dir=str(folder), **settings),
        widths=widths,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=partial(collate, extra_padding=extra_padding),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("backbone, labels", [("bert", 2), ("bert", 1), ("roberta", 2), ("electra", 2)])
def test_views_have_loss_and_gradients_of_explicit_cuts(tmp_path, backbone, labels):
    """One step over all widths against copies that are cut, run and differentiated one by one."""
    student, teacher = make_model(backbone, num_labels=labels), make_teacher(backbone, num_labels=labels)
    rows, gradients = make_rows(8), Gradients()
    if labels == 1:
        rows = [{**row, "labels": float(row["labels"])} for row in rows]
    copies = {width: subnetwork(student, width).train() for width in WIDTHS}
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, max_steps=1, callbacks=[gradients], max_grad_norm=0)
    trainer.train()
    batch = collate(rows)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        wanted = teacher(**inputs, output_hidden_states=True)
    total, expected = 0.0, {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    for narrow in copies.values():
        found = narrow(**inputs, output_hidden_states=True)
        loss = logits_loss(found.logits, wanted.logits, regression=labels == 1)
        hidden = hidden_states_loss(found.hidden_states, wanted.hidden_states, inputs["attention_mask"])
        (loss + 0.1 * hidden).backward()
        total += (loss + 0.1 * hidden).item()
        for name, parameter in narrow.named_parameters():
            if parameter.grad is not None:
                leading = tuple(slice(size) for size in parameter.shape)
                expected[name][leading] += parameter.grad
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total, rel=1e-5)
    (step,) = gradients.steps
    unused = {name for name in expected if name not in step}
    assert all(".pooler." in name for name in unused)
    for name, gradient in step.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    last = step[f"{student.base_model_prefix}.encoder.layer.0.output.dense.weight"]
    assert last[:, :4].abs().mean() > last[:, 37:].abs().mean() > 1e-6


def test_accumulation_has_the_gradients_of_one_big_batch(tmp_path):
    runs = []
    for args in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "extra_padding": 7}):
        gradients = Gradients()
        trainer = make_trainer(tmp_path, make_model(), make_teacher(), max_steps=1, callbacks=[gradients], **args)
        trainer.train()
        runs.append((gradients.steps[0], trainer.state.log_history[0]))
    (big, log), (accumulated, other_log) = runs
    for name, gradient in accumulated.items():
        torch.testing.assert_close(gradient, big[name], rtol=1e-4, atol=1e-6)
    for entry in ("loss", "loss_logits", "loss_hidden_states"):
        assert other_log[entry] == pytest.approx(log[entry], rel=1e-5)
    assert log["loss"] == pytest.approx(log["loss_logits"] + 0.1 * log["loss_hidden_states"], rel=1e-5)


def test_every_width_learns(tmp_path):
    student, teacher = make_model(), make_teacher()
    batch = collate(make_rows())

    def distances():
        wanted = logits(teacher, batch).softmax(-1)
        return [(logits(subnetwork(student, w), batch).softmax(-1) - wanted).abs().mean().item() for w in WIDTHS]

    before = distances()
    make_trainer(tmp_path, student, teacher, max_steps=40, learning_rate=3e-3).train()
    assert all(after < 0.7 * start for after, start in zip(distances(), before, strict=True))


def test_resumed_ends_in_the_same_weights(tmp_path):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer(folder, **changes):
        return make_trainer(folder, make_model(**dropout), make_teacher(), **{**args, **changes})

    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    first.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="belongs to another run:\n.*widths"):
        other = trainer(tmp_path / "other", widths=[1.0, 0.5])
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("off", [True, False])
def test_dropout_is_a_choice_for_every_width(tmp_path, off):
    """One row eight times in a batch: only dropout makes logits differ."""
    student = make_model(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    rows = make_rows(1) * 8
    trainer = make_trainer(tmp_path, student, make_teacher(), rows=rows, max_steps=1, without_dropout=off)
    spreads = []
    for narrow in (trainer.model, *(network for _, network in trainer._narrow)):
        narrow.register_forward_hook(lambda *args: spreads.append(args[-1].logits.std(0).max().item()))
    trainer.train()
    assert len(spreads) == len(WIDTHS) and all((spread < 1e-6) == off for spread in spreads), spreads


def test_sub_networks_run_in_mixed_precision_too(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), make_teacher(), bf16=True, max_steps=1)
    seen = []
    for narrow in (trainer.model, *(network for _, network in trainer._narrow)):
        narrow.classifier.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    trainer.train()
    assert seen == [torch.bfloat16] * len(WIDTHS)


def test_sub_networks_drop_out_too(tmp_path):
    student = make_model(hidden_dropout_prob=0.3)
    trainer = make_trainer(tmp_path, student, make_teacher(), rows=make_rows(1) * 8, max_steps=1)
    spread = []
    for narrow in (student, *(network for _, network in trainer._narrow)):
        narrow.register_forward_hook(lambda *args: spread.append(args[-1].logits.std(0).max().item()))
    trainer.train()
    assert len(spread) == len(WIDTHS) and min(spread) > 1e-2


def test_evaluation_is_that_of_the_full_width(tmp_path):
    student = make_model()
    trainer = make_trainer(tmp_path, student, make_teacher())
    batch = collate(make_rows())
    expected = student.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_the_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="attention_scores: a narrower network has fewer heads"):
        make_trainer(tmp_path, make_model(), make_teacher(), attention_scores_weight=1.0)
    for widths in ([0.5], [1.0, 0.5, 0.5]):
        with pytest.raises(ValueError, match="widths: expected different numbers, 1 among them"):
            make_trainer(tmp_path, make_model(), make_teacher(), widths=widths)
    with pytest.raises(ValueError, match="width: expected a number above 0"):
        make_trainer(tmp_path, make_model(), make_teacher(), widths=[1.0, 2.0])
    with pytest.raises(ValueError, match="low-bit class with bits 32-32-32, found BertForSequence"):
        make_trainer(tmp_path, make_teacher(), make_teacher())
    with pytest.raises(ValueError, match="with bits 32-32-32, found .* with bits 1-1-8"):
        make_trainer(tmp_path, make_model(bits="1-1-8"), make_teacher())


DISTRIBUTED = """
    import os, sys, torch
    folder, tests = sys.argv[1:]
    sys.path.insert(0, tests)
    from test_pruning import record_gradients
    torch.set_num_threads(1)
    gradients = record_gradients(folder, per_device_train_batch_size=4, ddp_backend="gloo")
    if os.environ["RANK"] == "0":
        torch.save(gradients, folder + "/gradients.pt")
    # left to the interpreter's exit, gloo's threads now and then abort a process that is done
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def record_gradients(folder, **args):
    gradients = Gradients()
    make_trainer(folder, make_model(), make_teacher(), callbacks=[gradients], **args).train()
    return gradients.steps


def test_two_processes_have_the_gradients_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    tests = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(tests))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "two").mkdir()
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "two"), tests],
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = torch.load(tmp_path / "two" / "gradients.pt", weights_only=True)
    one = record_gradients(tmp_path / "one", per_device_train_batch_size=8)
    for step in range(2):
        for name, gradient in two[step].items():
            torch.testing.assert_close(gradient, one[step][name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A tiny fine-tuned classifier of two heads with its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("pruning")
    make_backbone(folder / "backbone")
    make_backbone(folder / "classifier")
    model = randomize(BertForSequenceClassification(BertConfig(**TINY, id2label={0: "neg", 1: "pos"})), 1)
    model.save_pretrained(folder / "classifier")
    make_data(folder / "data")
    return folder


def prune_command(workplace, checkpoint, output, *more):
    data = ["--task", "rotten_tomatoes", "--data", str(workplace / "data"), "--max-length", "24"]
    return ["prune", str(checkpoint), *data, "--width", "0.5", "--output", str(output), *more]


def test_prune_command(workplace, tmp_path, capsys):
    output = tmp_path / "half"
    assert cli.main(prune_command(workplace, workplace / "classifier", output)) == 0
    printed = capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert type(model) is BinaryBertForSequenceClassification
    config = model.config
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (1, 16, 24)
    assert config.bits == "32-32-32" and config.id2label == {0: "neg", 1: "pos"}
    full = BertForSequenceClassification.from_pretrained(workplace / "classifier")
    assert f"{full.num_parameters():,} -> {model.num_parameters():,}" in printed
    assert "2 -> 1" in printed and "48 -> 24" in printed and "accuracy" in printed
    evaluate = ["evaluate", str(output), "--task", "rotten_tomatoes", "--data", str(workplace / "data")]
    assert cli.main([*evaluate, "--max-length", "24"]) == 0
    score = capsys.readouterr().out.split()[1]
    assert f"-> {score}" in printed

    again = tmp_path / "same"
    assert cli.main(prune_command(workplace, workplace / "classifier", again)) == 0
    assert (again / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert cli.main(prune_command(workplace, output, tmp_path / "quarter")) == 2  # 0.5 of one head


def test_prune_keeps_the_heads_that_matter(workplace, tmp_path):
    """The first head of layer 0 and the second of layer 1 say nothing: the other two stay."""
    folder = tmp_path / "planted"
    make_backbone(folder)
    model = BertForSequenceClassification.from_pretrained(workplace / "classifier")
    for layer, head in enumerate((0, 1)):
        model.bert.encoder.layer[layer].attention.output.dense.weight.data.view(32, 2, 16)[:, head] = 0
    model.save_pretrained(folder)
    assert cli.main(prune_command(workplace, folder, tmp_path / "half", "--split", "validation")) == 0
    pruned = load_file(tmp_path / "half" / "model.safetensors")
    for layer, head in enumerate((1, 0)):
        name = f"bert.encoder.layer.{layer}.attention.self.query.weight"
        assert torch.equal(pruned[name], model.state_dict()[name][16 * head : 16 * head + 16])


def test_what_cannot_be_pruned(workplace, tmp_path, capsys):
    assert cli.main(prune_command(workplace, workplace / "backbone", tmp_path / "out")) == 2
    assert "expected a fine-tuned classifier, its tensors ['classifier.bias'" in capsys.readouterr().err
    make_model(bits="1-1-8").save_pretrained(tmp_path / "binary")
    with pytest.raises(ValueError, match="field 'bits' must be 32-32-32 to prune, found 1-1-8"):
        load_full_precision(str(tmp_path / "binary"))
    assert not (tmp_path / "out").exists()
    ternary = load_full_precision(str(workplace / "classifier"), family="ternary")
    assert ternary.config.model_type == "ternary_bert"
    ternary.save_pretrained(tmp_path / "ternary")
    assert load_full_precision(str(tmp_path / "ternary")).config.model_type == "ternary_bert"
    assert AutoConfig.from_pretrained(tmp_path / "ternary").bits == "32-32-32"


def test_all_widths_at_once_by_the_shipped_recipe(workplace, tmp_path):
    """A rate of nothing in the second stage: what comes out is the leading half of what the first has trained."""
    places = (f"data.path={workplace / 'data'}", f"teacher.model={workplace / 'classifier'}", "teacher.fine_tune=null")
    recipe = Recipe.from_yaml(
        Path(__file__).parents[2] / "examples" / "recipes" / "dynabert.yaml",
        [
            *("data.task=rotten_tomatoes", "data.max_length=24", *places, "stages.0.widths=[1.0, 0.5]"),
            *("training.bf16=false", "training.max_steps=3", "training.per_device_train_batch_size=8"),
            *("stages.1.training.learning_rate=1e-30", "stages.1.training.weight_decay=0.0"),
        ],
    )
    results = run_recipe(recipe, tmp_path / "run", teachers=tmp_path / "teachers")
    assert [stage["steps"] for stage in results["stages"]] == [3, 3]
    (trained,) = (tmp_path / "teachers").glob("*-widths-*/model")
    full = AutoModelForSequenceClassification.from_pretrained(trained)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed").state_dict()
    assert full.config.num_attention_heads == 2
    expected = subnetwork(full, 0.5).state_dict()
    assert half.keys() == expected.keys() and all(torch.equal(half[name], expected[name]) for name in half)
