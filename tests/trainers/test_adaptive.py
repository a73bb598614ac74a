import itertools
import random

import pytest
import torch
from test_distillation import collate, make_rows
from test_pruning import EXTRA, PLAIN, SHAPE, make_model, make_teacher, randomize

from modeling_qbert import get_model_class
from trainers.adaptive import budget_in_kib, choose_modules, measure_gains, split_costs, split_multiply_adds
from trainers.losses import hidden_states_loss, logits_loss


BACKBONES = list(PLAIN)
QUERY_KEY = "encoder.layer.{0}.attention.self.query+encoder.layer.{0}.attention.self.key"
LAYER_UNITS = [
    QUERY_KEY,
    "encoder.layer.{}.attention.self.value",
    "encoder.layer.{}.attention.output.dense",
    "encoder.layer.{}.intermediate.dense",
    "encoder.layer.{}.output.dense",
]
POOLER = {"bert": "pooler.dense", "roberta": "classifier.dense", "electra": "classifier.dense"}


def binary(backbone="bert", **config):
    return make_model(backbone, **{"bits": "1-1-8", **config})


def batches(count=2):
    return [collate(make_rows(3, seed=seed)) for seed in range(count)]


def every_unit(backbone):
    layers = [unit.format(layer) for layer in range(2) for unit in LAYER_UNITS]
    return ["embeddings.word_embeddings", *layers, POOLER[backbone]]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "start, settings",
    [("ternary", {}), ("binary", {}), ("ternary", {"bits": "1-1-4", "activation_quantizer": "lsq"})],
)
def test_gains_are_those_of_models_built_with_ternary_modules(backbone, start, settings):
    model, teacher, given = binary(backbone, **settings), make_teacher(backbone), batches()
    model.calibrate(input_ids=given[0]["input_ids"], attention_mask=given[0]["attention_mask"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gains = measure_gains(model.train(), teacher.train(), given, start)
    assert list(gains) == every_unit(backbone)
    assert model.training and teacher.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    teacher.eval()

    @torch.no_grad()
    def distance(student):
        total = 0.0
        for batch in given:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            found, wanted = (m.eval()(**inputs, output_hidden_states=True) for m in (student, teacher))
            total += float(logits_loss(found.logits, wanted.logits))
            total += float(hidden_states_loss(found.hidden_states, wanted.hidden_states, inputs["attention_mask"]))
        return total / len(given)

    def distance_of(modules):
        config = type(model.config).from_dict(model.config.to_dict() | {"ternary_modules": modules})
        mixed = type(model)(config)
        mixed.load_state_dict(model.state_dict())
        return distance(mixed)

    everything = [name for unit in gains for name in unit.split("+")]
    reference = distance_of(everything if start == "ternary" else [])
    for unit, gain in gains.items():
        modules = unit.split("+")
        if start == "ternary":
            expected = distance_of([name for name in everything if name not in modules]) - reference
        else:
            expected = reference - distance_of(modules)
        assert gain == pytest.approx(expected, abs=1e-4), unit
    assert sum(abs(gain) > 1e-3 for gain in gains.values()) >= 9


def test_a_unit_that_is_bad_in_binary_gains_most():
    """Nearly all of its weights are 0, which one bit cannot say, and the others large."""
    teacher, planted = make_teacher(), "encoder.layer.1.output.dense"
    with torch.no_grad():
        weight = teacher.bert.get_submodule(planted).weight
        weight.copy_(3 * torch.sign(weight) * (torch.rand(weight.shape) < 0.05))
    model = get_model_class("binary", "bert", "sequence-classification")
    model = model(model.config_class(bits="1-1-8", **SHAPE))
    model.load_state_dict(teacher.state_dict())
    for start in ("ternary", "binary"):
        gains = measure_gains(model, teacher, batches(), start)
        assert max(gains, key=gains.get) == planted


def test_gains_of_regression_and_of_an_unlabelled_batch():
    model, teacher = binary(num_labels=1), make_teacher(num_labels=1)
    given = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches()]
    assert measure_gains(model, teacher, given) == measure_gains(model, teacher, batches())


def test_what_gains_refuse():
    teacher = make_teacher()
    for model in (
        teacher,
        binary().pack(),
        binary(planes=2),
        binary(ternary_modules=["encoder.layer.0.output.dense"]),
    ):
        with pytest.raises(ValueError, match="expected a latent binary model with one plane"):
            measure_gains(model, teacher, batches())
    with pytest.raises(ValueError, match="'2-2-8': expected binary weights"):
        measure_gains(binary(bits="2-2-8"), teacher, batches())
    with pytest.raises(ValueError, match="at least one batch"):
        measure_gains(binary(), teacher, [])
    with pytest.raises(ValueError, match="start: expected 'ternary' or 'binary', found 'float'"):
        measure_gains(binary(), teacher, batches(), "float")
    broken = make_teacher()
    broken.classifier.bias.data[0] = torch.inf
    model = binary()
    with pytest.raises(ValueError, match="not finite"):
        measure_gains(model, broken, batches())
    assert {module.spec.quantizer for module in model.modules() if hasattr(module, "spec")} == {"bwn"}


def test_specs_return_after_an_error():
    model, teacher = binary(), make_teacher()
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("enough")

    model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="enough"):
        measure_gains(model, teacher, batches())
    assert {module.spec.quantizer for module in model.modules() if hasattr(module, "spec")} == {"bwn"}


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_against_every_subset(seed):
    generator = random.Random(seed)
    count = generator.randint(1, 10)
    units = [f"unit{index}" for index in range(count)]
    # few different numbers, so that sums coincide; costs of 0 and gains below 0 among them
    gains = {unit: generator.choice([-1.0, 0.0, 0.5, 1.0, generator.random()]) for unit in units}
    costs = {unit: generator.choice([0, 1, 2, 5, generator.randint(0, 40)]) for unit in units}
    budget = generator.randint(0, sum(costs.values()) + 3)
    chosen = choose_modules(gains, costs, budget)
    subsets = itertools.chain.from_iterable(itertools.combinations(units, size) for size in range(count + 1))
    best = max(sum(gains[u] for u in subset) for subset in subsets if sum(costs[u] for u in subset) <= budget)
    assert sum(gains[unit] for unit in chosen) == pytest.approx(best, abs=1e-12)
    assert sum(costs[unit] for unit in chosen) <= budget
    assert all(gains[unit] > 0 for unit in chosen)
    assert chosen == [unit for unit in units if unit in chosen]
    for selection in ("random", "smallest_gain"):
        control = choose_modules(gains, costs, budget, selection, seed)
        spent = sum(costs[unit] for unit in control)
        assert spent <= budget
        assert all(spent + costs[unit] > budget for unit in units if unit not in control)  # nothing more fits


def test_selections():
    gains = {f"unit{index}": float(index) for index in range(8)}
    costs = dict.fromkeys(gains, 3)
    assert choose_modules(gains, costs, 9) == ["unit5", "unit6", "unit7"]
    assert choose_modules(gains, costs, 8) == ["unit6", "unit7"]
    assert choose_modules(gains, costs, 9, "smallest_gain") == ["unit0", "unit1", "unit2"]
    drawn = {tuple(choose_modules(gains, costs, 9, "random", seed)) for seed in range(30)}
    assert len(drawn) > 10
    assert choose_modules(gains, costs, 9, "random", 4) == choose_modules(gains, costs, 9, "random", 4)
    shuffled = dict(sorted(gains.items(), reverse=True))
    assert set(choose_modules(shuffled, costs, 9, "random", 4)) == set(choose_modules(gains, costs, 9, "random", 4))
    pair = QUERY_KEY.format(3)
    assert choose_modules({pair: 1.0}, {pair: 2}, 2) == pair.split("+")


def test_bad_choices():
    with pytest.raises(ValueError, match=r"different units: \['b'\]"):
        choose_modules({"a": 1.0}, {"a": 1, "b": 1}, 3)
    with pytest.raises(ValueError, match="budget: expected a cost that is a whole number of at least 0, found -1"):
        choose_modules({"a": 1.0}, {"a": 1}, -1)
    with pytest.raises(ValueError, match="a: expected a cost .* found 1.5"):
        choose_modules({"a": 1.0}, {"a": 1.5}, 2)
    with pytest.raises(ValueError, match="selection: expected one of gain, random, smallest_gain, found 'best'"):
        choose_modules({"a": 1.0}, {"a": 1}, 2, "best")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("selection", ["gain", "random"])
def test_the_split_file_keeps_its_budget(tmp_path, backbone, selection):
    """Of a network so wide that KiB matter: the file of what was chosen is below the MB asked for, and near."""
    cls = get_model_class("binary", backbone, "sequence-classification")
    shape = {**SHAPE, "hidden_size": 192, "intermediate_size": 800, "vocab_size": 2000, **EXTRA.get(backbone, {})}
    model = cls(cls.config_class(**shape))
    plain, costs = split_costs(model)
    assert list(costs) == every_unit(backbone)
    model.pack().save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size == plain
    megabytes = (plain + 0.6 * 1024 * sum(costs.values())) / 1e6
    gains = {unit: float(index % 4 + 1) for index, unit in enumerate(costs)}
    modules = choose_modules(gains, costs, budget_in_kib(megabytes, plain, costs), selection)
    split = cls(cls.config_class(**shape, planes=2, split_modules=modules))
    split.pack().save_pretrained(tmp_path / "split")
    size = (tmp_path / "split" / "model.safetensors").stat().st_size
    assert plain < size <= megabytes * 1e6
    spent = sum(cost for unit, cost in costs.items() if unit.split("+")[0] in modules)
    assert plain + 1024 * spent - size < 1100 * len(modules)

    full = cls(cls.config_class(**shape, planes=2))
    full.pack().save_pretrained(tmp_path / "full")
    whole = (tmp_path / "full" / "model.safetensors").stat().st_size
    assert 0 <= plain + 1024 * sum(costs.values()) - whole < 1100 * len(costs)


def test_budget_in_megabytes():
    costs = {"a": 100, "b": 50}
    assert budget_in_kib(1.0, 1_000_000, costs) == 0
    assert budget_in_kib(1.1, 1_000_000, costs) == 97
    assert budget_in_kib(9.9, 1_000_000, costs) == 150
    with pytest.raises(ValueError, match=r"at least 1.000, plain binary \(all split: 1.154\), found 0.9"):
        budget_in_kib(0.9, 1_000_000, costs)


def test_multiply_adds():
    costs = split_multiply_adds(randomize(binary(), 0), tokens=100)
    assert costs["embeddings.word_embeddings"] == 0
    assert costs["pooler.dense"] == 3  # 48 * 48, one token
    assert costs[QUERY_KEY.format(0)] == 461
    assert costs["encoder.layer.1.output.dense"] == 240
    assert list(costs) == every_unit("bert")
