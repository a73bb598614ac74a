"""What torch and accelerate do with a model: one compiled graph, exports, device maps, workers, casts."""

import copy
import shutil
import warnings

import pytest
import torch
from tiny import answers, inputs
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel
from zoo import BACKBONES, FAMILIES, build

from modeling_qbert.quantizers import LsqQuantizer


try:
    from modeling_qbert import native_ops
except ImportError:
    native_ops = None


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_is_one_graph(family):
    model, given = build(family, "bert", state="packed", num_hidden_layers=1), inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(compiled(**given).logits, expected, atol=1e-6, rtol=1e-6)
    assert model.is_packed and compiled.is_packed


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
def test_inductor():
    """torch.compile's own backend, after a call in the engine, which then alone held the bits."""
    model, given = build("ternary", "bert", state="packed", num_hidden_layers=1), inputs()
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(torch.compile(model)(**given).logits, expected, atol=1e-6, rtol=1e-6)


def loss_and_gradients(model, run):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = run(**inputs(), labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_compiles(family):
    one = build(family, "bert", num_hidden_layers=1, attention_probs_dropout_prob=0.0)
    two = copy.deepcopy(one)
    eager = loss_and_gradients(one, one)
    for found, expected in zip(loss_and_gradients(two, torch.compile(two, backend="aot_eager")), eager):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_graph_without_step_sizes_gives_no_numbers():
    """Where eager code raises an error; steps with values are read, whether eager code ran before or not."""
    model = build("binary", "bert", num_hidden_layers=1, bits="1-1-4", activation_quantizer="lsq").eval()
    given = inputs()
    model.calibrate(**given)
    expected, ready = model(**given).logits, copy.deepcopy(model)
    for module in ready.modules():
        if isinstance(module, LsqQuantizer):
            module.ready = False
    torch.testing.assert_close(torch.compile(ready, backend="aot_eager")(**given).logits, expected)
    for module in model.modules():
        if isinstance(module, LsqQuantizer):
            module.reset()
    assert bool(torch.compile(model, backend="aot_eager")(**given).logits.isnan().all())
    with pytest.raises(ValueError, match="step sizes have no value yet"):
        model(**given)


@pytest.mark.parametrize("cpu", [None, "off", "scalar"])
def test_export_may_come_first(fresh_process, cpu):
    """With the engine, and without it by torch's operators alone."""
    found = fresh_process("export_first.py", **({} if cpu is None else {"QBERT_CPU": cpu}))
    assert int(found) == (0 if cpu == "off" or native_ops is None else PRODUCTS)


PRODUCTS = 7  # of one layer and the pooler
SETTINGS = {
    "ternary": {},
    "per group": {"weight_granularity": "per_group", "group_size": 16, "bits": "2-2-4"},
    "ghost": {},
    "binary": {"planes": 2, "activation_quantizer": "pact"},
    "learned steps": {"bits": "1-1-4", "activation_quantizer": "lsq", "hidden_act": "relu"},
    "signs": {"bits": "1-1-1", "activation_quantizer": "lsq"},
}


def packed(setting, backbone="bert"):
    family = setting if setting in FAMILIES else "ternary" if setting == "per group" else "binary"
    model = build(family, backbone, num_hidden_layers=1, **SETTINGS[setting])
    model.calibrate(**inputs())
    return model.pack()


def products_in(graph) -> int:
    return sum("qbert.packed_linear" in str(node.target) for node in graph.nodes)


@pytest.mark.skipif(native_ops is None, reason="no native engine here")
@pytest.mark.parametrize(
    "setting, backbone", [*((name, "bert") for name in SETTINGS), ("ternary", "roberta"), ("ghost", "electra")]
)
def test_graphs_hold_the_products_of_the_engine(setting, backbone):
    """One node a product, and the very bits of the eager answer, whatever batch and length come."""
    model, graphs = packed(setting, backbone), []

    def backend(module, _):
        graphs.append(module.graph)
        return module

    batches = [inputs(), inputs(batch=5, tokens=17), inputs(batch=2, tokens=4)]
    with torch.no_grad():
        expected = [model(**given).logits for given in batches]
        for run in (backend, "aot_eager"):
            compiled = torch.compile(model, backend=run, fullgraph=True, dynamic=True)
            for given, logits in zip(batches, expected):
                assert torch.equal(compiled(**given).logits, logits)
            torch._dynamo.reset()
        sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=38)}
        program = torch.export.export(model, (), inputs(), dynamic_shapes=dict.fromkeys(inputs(), sizes))
        for given, logits in zip(batches, expected):
            assert torch.equal(program.module()(**given).logits, logits)
    assert [products_in(graph) for graph in graphs] == [PRODUCTS]
    assert products_in(program.graph) == PRODUCTS


@pytest.mark.skipif(native_ops is None, reason="no native engine here")
def test_the_operator_follows_its_tensors():
    layer = packed("ternary").bert.encoder.layer[0].intermediate.dense
    x, other = torch.randn(5, layer.in_features), packed("signs").bert.encoder.layer[0].output.dense
    for one in (layer, other):
        size = torch.randn(5, one.in_features)
        bias = None if one is other else one.bias
        given = (one.weight, one.weight_scale, bias, one.packing, one.spec.group_size)
        torch.library.opcheck(
            native_ops.packed_linear, (size, *given, *native_ops.parts_of_place(one.activation)), test_utils=CHECKS
        )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(native_ops.traced_linear(layer, x), layer(x))
    for change in (layer.weight.zero_, lambda: layer.weight_scale.mul_(2), lambda: layer.bias.fill_(3.0)):
        before = native_ops.traced_linear(layer, x)
        with torch.no_grad():
            change()
        layer._codes = None
        after = native_ops.traced_linear(layer, x)
        assert torch.equal(after, layer(x)) and not torch.equal(after, before)
    address = layer.weight.data_ptr()
    assert address in native_ops._weights
    layer.weight = layer.weight.clone()
    native_ops.traced_linear(layer, x)
    assert address not in native_ops._weights  # nothing is kept of a weight that is gone


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_gradients_of_an_adapter_pass_a_compiled_layer():
    model = packed("ternary")
    x = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    layer = model.bert.encoder.layer[0].intermediate
    gradients = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        (gradient,) = torch.autograd.grad(run(x).sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def device_map(model, place):
    """Everything on the CPU, the encoder on `place`."""
    base = {f"{model.base_model_prefix}.{name}": "cpu" for name, _ in model.base_model.named_children()}
    heads = {name: "cpu" for name, module in model.named_children() if module is not model.base_model}
    return base | heads | {f"{model.base_model_prefix}.encoder": place}


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("family, backbone", BACKBONES)
def test_device_maps(family, backbone, state, tmp_path):
    model, given = build(family, backbone, state=state), inputs()
    expected = answers(model, given)
    model.save_pretrained(tmp_path / "saved")
    for places in ("cpu", "auto", {"": "cpu"}, device_map(model, "cpu"), device_map(model, "disk")):
        offloaded = isinstance(places, dict) and "disk" in places.values()
        loaded = type(model).from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "away")
        for _ in range(2):
            assert torch.equal(answers(loaded, given), expected), places
        assert torch.equal(answers(copy.deepcopy(loaded), given), expected)
        if not offloaded:
            loaded.save_pretrained(tmp_path / "again")
            path = "model.safetensors"
            assert (tmp_path / "again" / path).read_bytes() == (tmp_path / "saved" / path).read_bytes()
    refused = [loaded.pack, loaded.dequantize]
    if state == "packed":
        refused.append(lambda: loaded.save_pretrained(tmp_path / "other"))
    else:  # Transformers reads latent weights back when it saves them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded.save_pretrained(tmp_path / "other")
        assert torch.equal(answers(type(model).from_pretrained(tmp_path / "other"), given), expected)
    for call in refused:
        with pytest.raises(ValueError, match=r"tensor '.*encoder.*' is offloaded; load the model with every part"):
            call()


class Answers(Dataset):
    """Rows computed by a model inside the worker."""

    def __init__(self, model):
        self.model, self.given = model, inputs()

    def __len__(self):
        return 3

    def __getitem__(self, row):
        with torch.no_grad():
            return self.model(**{name: tensor[row : row + 1] for name, tensor in self.given.items()}).logits[0]


def test_models_travel_to_workers():
    """Latent and packed models of every family are pickled to a spawned worker, and answer there as here."""
    states = [build(family, "bert", state=state) for family in FAMILIES for state in ("latent", "packed")]
    rows = torch.utils.data.ConcatDataset([Answers(model) for model in states])
    expected = torch.stack([row for row in rows])
    found = torch.cat(list(DataLoader(rows, batch_size=3, num_workers=1, multiprocessing_context="spawn")))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family, backbone", BACKBONES)
def test_a_cast_latent_model_packs_to_what_it_answers(family, backbone, dtype):
    """Codes come from the cast weights, scales of a packed model have their own type whatever the model's is."""
    model, given = build(family, backbone), inputs()
    expected = answers(model, given)
    model.to(dtype)
    found = answers(model, given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.5, rtol=0.2)
    packed = model.pack()
    assert torch.equal(answers(packed, given), found)
    scales = {name: scale.dtype for name, scale in packed.state_dict().items() if name.endswith("weight_scale")}
    short = {f"{backbone}.embeddings.word_embeddings.weight_scale"} if family == "binary" else set()
    assert scales and scales == {name: torch.bfloat16 if name in short else torch.float32 for name in scales}


@pytest.mark.parametrize("family, backbone", BACKBONES)
def test_the_backbone_alone_is_saved_packed(family, backbone, tmp_path):
    """`model.base_model` is a plain Transformers class; its file is a checked one all the same."""
    given = inputs()
    made = build(family, backbone, state="packed")
    made.save_pretrained(tmp_path / "whole")
    for number, model in enumerate((made, type(made).from_pretrained(tmp_path / "whole"))):
        model.base_model.save_pretrained(tmp_path / str(number))
        pooler = {} if getattr(model.base_model, "pooler", True) is not None else {"add_pooling_layer": False}
        loaded = AutoModel.from_pretrained(tmp_path / str(number), **pooler)
        with torch.no_grad():
            assert torch.equal(loaded(**given)[0], model.base_model(**given)[0])


def test_attentions_may_be_asked_for_in_the_config(tmp_path):
    model, given = build("ternary", "bert"), inputs()
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
    model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    for other in (model, type(model).from_pretrained(tmp_path)):
        with torch.no_grad():
            found = other(**given).attentions
        assert len(found) == 2 and all(torch.equal(one, two) for one, two in zip(found, expected))
