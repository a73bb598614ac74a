import math
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    TrainerCallback,
    set_seed,
)

import modeling_qbert
from trainers.distillation import DistillationArguments, DistillationTrainer


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 32,
}
PLAIN = BertForSequenceClassification


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def make_model(seed=0, cls=PLAIN, dropout=0.0, **config):
    set_seed(seed)
    config = {**SHAPE, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **config}
    model = cls(BertConfig(**config))
    with torch.no_grad():  # the default initialisation is so small that every model says nearly the same
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_rows(count=16, seed=0, head="sequence"):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(3, 20, (), generator=generator))
        row = {"input_ids": torch.randint(1, 99, (length,), generator=generator)}
        labels = {"sequence": {"labels": index % 2}, "span": {"start_positions": 1, "end_positions": 2}, "token": {}}
        rows.append({**row, **labels[head]})
    return rows


def collate(rows, extra_padding=0):
    """Pads to the longest row of the batch plus `extra_padding`."""
    longest = max(len(row["input_ids"]) for row in rows) + extra_padding
    batch = {"input_ids": [], "attention_mask": []}
    for row in rows:
        padding = longest - len(row["input_ids"])
        batch["input_ids"].append(torch.nn.functional.pad(row["input_ids"], (0, padding)))
        batch["attention_mask"].append(torch.tensor([1] * (longest - padding) + [0] * padding))
    batch = {name: torch.stack(value) for name, value in batch.items()}
    names = rows[0].keys() - {"input_ids"}
    return {**batch, **{name: torch.tensor([row[name] for row in rows]) for name in names}}


class InOrder(DistillationTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset)


def make_trainer(folder, student, teacher, *, rows=None, extra_padding=0, callbacks=None, **args):
    settings = {
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
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=partial(collate, extra_padding=extra_padding),
        callbacks=callbacks,
    )


def only(target):
    return {f"{name}_weight": float(name == target) for name in (*TARGETS, "labels")}


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step, as clipped."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):  # noqa: ARG002
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


TARGETS = ("logits", "hidden_states", "attention_scores")


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_alone_falls(tmp_path, target):
    trainer = make_trainer(
        tmp_path,
        make_model(1),
        make_model(2),
        max_steps=41,
        learning_rate=3e-3,
        **only(target),
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [entry[f"loss_{target}"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 41
    floor = 0.0
    if target == "logits":  # soft cross-entropy ends at the teacher's entropy, not at 0
        batch = collate(make_rows()[:8])
        with torch.no_grad():
            distribution = trainer.teacher(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1)
        floor = float(-(distribution * distribution.log()).mean())
    assert losses[0] > floor + 1e-3
    assert losses[40] - floor < 0.5 * (losses[0] - floor)  # both on the first eight rows
    others = {f"loss_{name}" for name in TARGETS} - {f"loss_{target}"}
    assert not others & set(trainer.state.log_history[0])


def test_teacher_stays_and_every_student_parameter_moves(tmp_path):
    student, teacher = make_model(1), make_model(2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher_before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, student, teacher, max_steps=3)
    trainer.train()
    still = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert all(torch.equal(value, teacher_before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("target", TARGETS)
def test_accumulation_has_the_gradients_of_one_big_batch(tmp_path, target):
    """8 rows at once, or as 4 x 2 rows, each micro-batch padded to its own longest row or far beyond it."""
    runs = {}
    for name, args in {
        "big": {},
        "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "4x2 padded": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "extra_padding": 7},
    }.items():
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path, make_model(1), make_model(2), max_steps=1, callbacks=[gradients], **only(target), **args
        )
        trainer.train()
        runs[name] = (gradients.steps[0], trainer.state.log_history[0])
    big, log = runs.pop("big")
    assert max(g.abs().max() for g in big.values()) > 1e-3
    for gradients, other_log in runs.values():
        assert gradients.keys() == big.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, big[name], rtol=1e-5, atol=1e-6)
        for entry in ("loss", f"loss_{target}", "grad_norm"):
            assert other_log[entry] == pytest.approx(log[entry], rel=1e-5)


def test_terms_are_logged_without_weights_and_averaged_over_the_window(tmp_path):
    logs = []
    for logging_steps in (1, 4):
        weights = {"logits_weight": 2.0, "hidden_states_weight": 0.5, "attention_scores_weight": 0.25}
        trainer = make_trainer(
            tmp_path, make_model(1), make_model(2), max_steps=4, logging_steps=logging_steps, **weights
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    (every_step, (window,)) = logs
    assert len(every_step) == 4
    for entry in (*every_step, window):
        total = 2 * entry["loss_logits"] + 0.5 * entry["loss_hidden_states"] + 0.25 * entry["loss_attention_scores"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    for target in TARGETS:
        mean = sum(entry[f"loss_{target}"] for entry in every_step) / 4
        assert window[f"loss_{target}"] == pytest.approx(mean, rel=1e-5)


def test_evaluation_is_the_task_loss_without_teacher(tmp_path):
    student = make_model(1)
    trainer = make_trainer(tmp_path, student, make_model(2), max_steps=2, eval_strategy="steps", eval_steps=1)
    seen = []
    trainer.teacher.register_forward_pre_hook(lambda *_: seen.append("teacher"))
    student.register_forward_pre_hook(lambda *_: seen.append(student.config._attn_implementation))
    before = student.config._attn_implementation
    trainer.train()
    assert seen == ["teacher", "qbert_scores", before, before] * 2  # two batches of evaluation after each step
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    batch = collate(make_rows())
    with torch.no_grad():
        expected = student.eval()(**batch).loss.item()
    assert logged[-1] == pytest.approx(expected, rel=1e-5)


def test_attention_implementation_is_restored(tmp_path):
    student, teacher = make_model(1), make_model(2)
    before = student.config._attn_implementation, teacher.config._attn_implementation
    trainer = make_trainer(tmp_path, student, teacher, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == before
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        trainer.save_model(str(tmp_path / "final"))
        assert "qbert_scores" not in (folder / "config.json").read_text()

    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path / "other", student, teacher, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == before


@pytest.mark.parametrize("target", TARGETS)
def test_only_what_is_needed_is_captured(tmp_path, target):
    trainer = make_trainer(tmp_path, make_model(1), make_model(2), max_steps=1, **only(target))
    asked = []
    for model in (trainer.model, trainer.teacher):
        model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)  # noqa: ARG005
    trainer.train()
    assert len(asked) == 2
    for kwargs in asked:
        assert kwargs["output_hidden_states"] == (target == "hidden_states")
        assert kwargs["output_attentions"] == (target == "attention_scores")
        assert "labels" not in kwargs


@pytest.mark.parametrize("cls, head, config", [
    (BertForSequenceClassification, "sequence", {}),
    (BertForSequenceClassification, "sequence", {"num_labels": 1, "problem_type": "regression"}),
    (BertForQuestionAnswering, "span", {}),
])  # fmt: skip
def test_labels_alone_are_the_task_loss_and_need_no_teacher(tmp_path, cls, head, config):
    student, rows = make_model(1, cls, **config), make_rows(8, head=head)
    if config:
        rows = [{**row, "labels": float(row["labels"])} for row in rows]
    trainer = make_trainer(tmp_path, student, make_model(2, cls, **config), rows=rows, max_steps=1, **only("labels"))
    trainer.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    with torch.no_grad():
        expected = student.train()(**collate(rows)).loss.item()
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss_labels" in entry)
    assert logged["loss_labels"] == pytest.approx(expected, rel=1e-5) == logged["loss"]


def test_labels_beside_another_target(tmp_path):
    student = make_model(1)
    trainer = make_trainer(tmp_path, student, make_model(2), max_steps=1, **(only("logits") | {"labels_weight": 0.5}))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["loss_logits"] + 0.5 * entry["loss_labels"], rel=1e-5)
    rows = [{"input_ids": row["input_ids"]} for row in make_rows()]
    with pytest.raises(ValueError, match="labels: the batch holds none of this head"):
        make_trainer(tmp_path / "none", student, make_model(2), rows=rows, **only("labels")).train()


def test_teacher_dropout_is_a_choice(tmp_path):
    rows = make_rows(1) * 64
    spread = {}
    for active in (False, True):
        teacher = make_model(2, dropout=0.3)
        trainer = make_trainer(
            tmp_path, make_model(1), teacher, rows=rows, max_steps=1, teacher_dropout=active, **only("hidden_states")
        )
        assert trainer.teacher.training is active
        outputs = []
        teacher.register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[-1].logits))
        trainer.train()
        spread[active] = outputs[0].std(0).max().item()
    assert spread[False] == pytest.approx(0, abs=1e-6)
    assert spread[True] > 1e-2


def test_student_dropout_is_a_choice(tmp_path):
    """One row eight times in a batch: only dropout makes outputs differ."""
    rows = make_rows(1) * 64
    for off in (False, True):
        student = make_model(1, dropout=0.3)
        options = only("hidden_states") | {"attention_scores_weight": 1.0}
        trainer = make_trainer(
            tmp_path / str(off), student, make_model(2), rows=rows, max_steps=1, without_dropout=off, **options
        )
        seen = []
        for module in (student.bert.embeddings, student.bert.encoder.layer[0].attention.self, student):
            module.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        trainer.train()
        spread = [output.std(0).max().item() for output in (seen[0], seen[1][0], seen[2].logits)]
        assert len(seen) == 3 and all((value < 1e-6) == off for value in spread), spread
        dropout = [module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)]
        assert dropout and set(dropout) == {0.3} and student.config.hidden_dropout_prob == 0.3


def test_a_target_that_yields_nothing_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, make_model(1), make_model(2), **only("attention_scores"))
    forward = trainer.teacher.forward

    def without_attentions(**kwargs):
        output = forward(**kwargs)
        output.attentions = ()
        return output

    trainer.teacher.forward = without_attentions
    with pytest.raises(ValueError, match="attention_scores: the teacher returned 0 layers to distil, expected 2"):
        trainer.train()


@pytest.mark.parametrize("where", [*TARGETS, "gradient norm"])
def test_non_finite_stops_before_the_optimizer_step(tmp_path, where):
    """Poisoned at the third step: weights and the checkpoint of the second one stay as they were."""
    student = make_model(1)
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **(only(where) if where in TARGETS else {})}
    trainer = make_trainer(tmp_path, student, make_model(2), **args)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # noqa: ARG002
            self.weights = {name: value.clone() for name, value in student.state_dict().items()}
            if state.global_step != 2:
                return
            if where == "gradient norm":
                student.bert.embeddings.word_embeddings.weight.register_hook(lambda gradient: gradient * math.inf)
            elif where == "logits":
                trainer.teacher.classifier.bias.data.fill_(math.nan)
            elif where == "hidden_states":
                trainer.teacher.bert.embeddings.LayerNorm.register_forward_hook(lambda *args: args[-1] * 1e30)
            else:
                trainer.teacher.bert.encoder.layer[1].attention.self.query.bias.data.fill_(math.inf)

    poison = Poison()
    trainer.add_callback(poison)
    expected = {"gradient norm": "gradient norm is (inf|nan)"}.get(where, f"loss_{where} is (inf|nan)")
    with pytest.raises(FloatingPointError, match=f"step 3: {expected}; stopped before the optimizer step"):
        trainer.train()
    assert all(torch.equal(value, poison.weights[name]) for name, value in student.state_dict().items())
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    saved = PLAIN.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in poison.weights.items())


@pytest.mark.parametrize(
    "student, teacher, args, message",
    [
        ({}, {"vocab_size": 98}, only("logits"), "vocab_size differs: student 99, teacher 98"),
        ({"num_labels": 3}, {}, only("logits"), "num_labels differs: student 3, teacher 2"),
        ({"num_hidden_layers": 1}, {}, only("hidden_states"), "num_hidden_layers differs: student 1, teacher 2"),
        ({"num_hidden_layers": 1}, {}, only("attention_scores"), "num_hidden_layers differs"),
        ({"hidden_size": 16}, {}, only("hidden_states"), "hidden_size differs: student 16, teacher 32"),
        ({"num_attention_heads": 4}, {}, only("attention_scores"), "num_attention_heads differs"),
        ({"problem_type": "multi_label_classification"}, {}, only("logits"), "multi_label"),
    ],
)
def test_models_that_do_not_fit(tmp_path, student, teacher, args, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model(1, **student), make_model(2, **teacher), **args)


def test_shapes_may_differ_when_no_target_needs_them(tmp_path):
    student = make_model(1, num_hidden_layers=1, hidden_size=16, num_attention_heads=1)
    make_trainer(tmp_path, student, make_model(2), **only("logits")).train()


def test_teacher_must_be_another_model(tmp_path):
    model = make_model(1)
    with pytest.raises(ValueError, match="same object"):
        make_trainer(tmp_path, model, model)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"logits_weight": -1.0}, "logits_weight must be finite and at least 0, got -1.0"),
        ({"hidden_states_weight": math.nan}, "hidden_states_weight"),
        (dict.fromkeys((f"{target}_weight" for target in TARGETS), 0.0), "nothing to distil"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"scale_refresh_steps": 0}, "scale_refresh_steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **args)


@pytest.mark.parametrize(
    "cls, head, config",
    [
        (BertForQuestionAnswering, "span", {}),
        (BertForTokenClassification, "token", {"num_labels": 5}),
        (PLAIN, "sequence", {"num_labels": 1}),
    ],
)
def test_other_heads_learn_their_logits(tmp_path, cls, head, config):
    """Span logits, token logits, regression: accumulated steps have the big batch's gradients, and the term falls."""
    runs = []
    for args in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "extra_padding": 3}):
        gradients = Gradients()
        student, teacher = make_model(1, cls, **config), make_model(2, cls, **config)
        rows = make_rows(8, head=head)
        trainer = make_trainer(
            tmp_path, student, teacher, rows=rows, max_steps=10, callbacks=[gradients], **only("logits"), **args
        )
        trainer.train()
        losses = [entry["loss_logits"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        runs.append(gradients.steps[0])
    big, accumulated = runs
    assert max(g.abs().max() for g in big.values()) > 1e-3
    for name, gradient in accumulated.items():
        torch.testing.assert_close(gradient, big[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_computes_losses_in_float32(tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, make_model(1), make_model(2), bf16=bf16, max_steps=8)
        terms = []
        original = trainer._terms
        trainer._terms = lambda *args, original=original, terms=terms: terms.append(original(*args)) or terms[-1]
        trainer.train()
        assert all(term.dtype == torch.float32 for step in terms for term in step.values())
        losses[bf16] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def test_teacher_prepared_by_an_earlier_trainer_loses_its_precision(tmp_path):
    teacher = make_model(2)
    make_trainer(tmp_path, make_model(1), teacher, bf16=True, max_steps=1).train()
    seen = []
    trainer = make_trainer(tmp_path, make_model(1), teacher, max_steps=1)
    teacher.classifier.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    trainer.train()
    assert seen == [torch.float32]


def make_student(seed=1, family="Ternary", **config):
    base = make_model(seed)
    model_class = getattr(modeling_qbert, f"{family}BertForSequenceClassification")
    student = model_class(model_class.config_class(**SHAPE, **config))
    student.load_state_dict(base.state_dict(), strict=False)
    return student


@pytest.mark.parametrize("weight_quantizer", ["twn", "lat"])
def test_ternary_student_learns_from_a_plain_teacher(tmp_path, weight_quantizer):
    student = make_student(weight_quantizer=weight_quantizer)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = make_trainer(tmp_path, student, make_model(1), max_steps=31, learning_rate=2e-3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[30] < 0.8 * losses[0]
    assert not [name for name, p in student.named_parameters() if torch.equal(p, before[name])]


def steps_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("_quantizer.step")}


def test_step_sizes_learn_at_rates_in_their_own_units(tmp_path):
    first = {}

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):  # noqa: ARG002
            first.update({name: float(step) for name, step in steps_of(model).items()})

    student = make_student(bits="1-1-1", activation_quantizer="lsq", hidden_act="relu", family="Binary")
    rates = {"learning_rate": 1e-3, "quantizer_learning_rate": 0.05, "step_learning_rate": 0.5}
    trainer = make_trainer(tmp_path, student, make_model(), callbacks=[Begin()], max_steps=1, **rates)
    trainer.train()
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert len(first) > 10 and len(set(first.values())) > 5
    for name, parameter in student.named_parameters():
        expected = 0.5 * first[name] if name in first else 0.05 if name.endswith("_quantizer.shift") else 1e-3
        assert groups[id(parameter)]["initial_lr"] == pytest.approx(expected), name


@pytest.mark.parametrize("rates", [{"step_learning_rate": 10.0}, {"quantizer_learning_rate": 10.0}])
def test_step_sizes_stay_above_zero(tmp_path, rates):
    student = make_student(bits="2-2-4", activation_quantizer="lsq", hidden_act="relu")
    trainer = make_trainer(tmp_path, student, make_model(), max_steps=4, **rates)
    trainer.train()
    steps = [float(step) for step in steps_of(student).values()]
    assert min(steps) == pytest.approx(1e-5) and max(steps) > 1e-3  # some were carried below
    assert student.pack().is_packed


@pytest.mark.parametrize("every", [1, 3])
def test_loss_aware_scales_get_second_moments(tmp_path, every):
    student = make_student(weight_quantizer="lat")
    trainer = make_trainer(tmp_path, student, make_model(1), max_steps=6, scale_refresh_steps=every)
    calls = []
    update = student.update_scales
    student.update_scales = lambda moments: calls.append((trainer.state.global_step, moments)) or update(moments)
    trainer.train()
    assert [step for step, _ in calls] == list(range(every, 7, every))
    names = {name for name, _ in student.named_parameters()}
    for _, moments in calls:
        assert moments.keys() == names
        assert all((value >= 0).all() and value.any() for value in moments.values())


DISTRIBUTED = """
    import os, sys, torch
    folder, tests = sys.argv[1:]
    sys.path.insert(0, tests)
    from test_distillation import train_and_record
    torch.set_num_threads(1)
    record = train_and_record(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo",
        extra_padding=5 * int(os.environ["RANK"]),
    )
    if os.environ["RANK"] == "0":
        torch.save(record, folder + "/record.pt")
    # left to the interpreter's exit, gloo's threads now and then abort a process that is done
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def train_and_record(folder, **args):
    gradients = Gradients()
    trainer = make_trainer(
        folder, make_model(1), make_model(2), save_strategy="steps", save_steps=2, callbacks=[gradients], **args
    )
    trainer.train()
    return {"gradients": gradients.steps, "log": trainer.state.log_history[:2]}


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """2 processes x 2 accumulated micro-batches x 2 rows, each padded differently, against 8 rows at once."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    tests = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(tests))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "two"), tests],
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = torch.load(tmp_path / "two" / "record.pt", weights_only=True)
    one = train_and_record(tmp_path / "one", per_device_train_batch_size=8)
    for step in range(2):
        assert two["gradients"][step].keys() == one["gradients"][step].keys()
        for name, gradient in two["gradients"][step].items():
            torch.testing.assert_close(gradient, one["gradients"][step][name], rtol=1e-4, atol=1e-6)
        for entry in ("loss", "grad_norm", *(f"loss_{target}" for target in TARGETS)):
            assert two["log"][step][entry] == pytest.approx(one["log"][step][entry], rel=1e-4)
    files = {path.name for path in (tmp_path / "two" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "MANIFEST.json"} <= files
    assert not list((tmp_path / "two").glob("tmp-*"))


def test_multiple_choice_counts_questions_and_every_choice_s_tokens(tmp_path):
    student, teacher = make_model(1, BertForMultipleChoice), make_model(2, BertForMultipleChoice)
    trainer = make_trainer(tmp_path, student, teacher, attention_scores_weight=0.0)
    rows = collate(make_rows(6))
    batch = {name: value.reshape(2, 3, *value.shape[1:]) for name, value in rows.items() if name != "labels"}
    student.train()
    _, output = trainer.compute_loss(student, batch, return_outputs=True)
    with torch.no_grad():
        expected = teacher(**batch, output_hidden_states=True)
    logits = -(expected.logits.softmax(-1) * output.logits.log_softmax(-1)).mean()
    real = rows["attention_mask"].bool()
    hidden = sum(
        (s[real] - t[real]).square().mean() for s, t in zip(output.hidden_states, expected.hidden_states, strict=True)
    )
    torch.testing.assert_close(trainer._step_losses["loss_logits"], logits.detach())
    torch.testing.assert_close(trainer._step_losses["loss_hidden_states"], hidden.detach())
