"""Transformers' own model tests on every family, backbone and state: `make hf-tests`.

A new family needs nothing here: the tests follow `modeling_qbert._FAMILIES`. `SKIPS` says why a test does not apply.
"""

import sys
import unittest
from pathlib import Path


ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / ".cache" / "transformers-tests"))

from transformers_tests import test_modeling_common  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

from modeling_qbert import _FAMILIES  # noqa: E402


STATES = ("latent", "packed")
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
BACKBONE_SIZES = {"electra": {"embedding_size": 16}}

_ONE_ATTENTION = "quantized attention has one implementation: 'eager' and 'sdpa' both select it"
_STRICT = "loading is strict: a checkpoint without the backbone's tensors is refused, and this test loads one"
_FROZEN = "packed weights are frozen codes: nothing in the model takes a gradient, adapters train beside them"
_FIXED = "a packed file is bound to its config and checked against it; another size is refused, not initialised"
_CODES = "packed weights are made of trained weights or read from a file; there is nothing to initialise or resize"

SKIPS = {
    "latent": {
        "test_can_set_attention_dynamically": _ONE_ATTENTION,
        "test_sdpa_can_dispatch_non_composite_models": _ONE_ATTENTION,
        "test_model_weights_reload_no_missing_tied_weights": _STRICT,
    },
    "packed": {
        "test_can_set_attention_dynamically": _ONE_ATTENTION,
        "test_sdpa_can_dispatch_non_composite_models": _ONE_ATTENTION,
        "test_model_weights_reload_no_missing_tied_weights": _STRICT,
        "test_from_pretrained_no_checkpoint": "packed weights need the quantization_config that this test leaves out",
        "test_can_load_ignoring_mismatched_shapes": _FIXED,
        "test_load_with_mismatched_shapes": _FIXED,
        "test_init_weights_can_init_buffers": _CODES,
        "test_model_get_set_embeddings": "the packed word embedding has no float matrix and is no nn.Embedding",
        "test_resize_embeddings_untied": _CODES,
        "test_resize_embeddings_untied_no_reinit_on_post_init": _CODES,
        "test_resize_tokens_embeddings": _CODES,
        "test_problem_types": _FROZEN,
        "test_retain_grad_hidden_states_attentions": _FROZEN,
        "test_training": _FROZEN,
        "test_training_overfit": _FROZEN,
    },
}


_NEW_HEAD = (
    "the head has a packed dense layer: a new one cannot be made for a packed backbone, and the load is refused"
)
BACKBONE_SKIPS = {
    ("roberta", "packed"): {"test_correct_missing_keys": _NEW_HEAD},
    ("electra", "packed"): {"test_correct_missing_keys": _NEW_HEAD},
}

_names_of = test_modeling_common.get_values


def _names_with_ours(mapping):
    """Transformers' tests tell heads by their list of class names; ours stand where their BERT stands."""
    names = list(_names_of(mapping))
    return names + [
        kind.__name__
        for backbones in _FAMILIES.values()
        for heads in backbones.values()
        for kind in heads.values()
        if any(base.__module__.startswith("transformers.") and base.__name__ in names for base in kind.__mro__)
    ]


test_modeling_common.get_values = _names_with_ours


def packed_class(kind: type) -> type:
    """A model class whose instances are packed as soon as they have weights, under the name of `kind`."""

    def __init__(self, config, *args, **kwargs):
        kind.__init__(self, config, *args, **kwargs)
        if not any(parameter.is_meta for parameter in self.parameters()):  # a file's weights arrive later
            self.__dict__ = self.pack().__dict__

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


class Tester:
    """Configs and inputs of one family on one backbone, as Transformers' tests ask for them."""

    is_training, num_choices, batch_size, seq_length = True, 4, 3, 7
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, parent: unittest.TestCase, heads: dict[str, type], backbone: str):
        self.parent, self.config_class = parent, heads["base"].config_class
        self.causal_lm_class = heads["masked-lm"]  # the head that the training test gives ids as labels
        self.fields = SIZES | BACKBONE_SIZES.get(backbone, {})
        if self.config_class.bits == "32-32-32":  # nothing to pack by default
            self.fields["bits"] = "2-2-8"

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        ids = ids_tensor(shape, SIZES["vocab_size"] - 3) + 3  # RoBERTa counts positions from its padding token
        return self.get_config(), {"input_ids": ids, "attention_mask": random_attention_mask(shape)}


class LowBitModelTest(ModelTesterMixin, TrainingTesterMixin):
    """What all families share; subclasses set `family`, `backbone` and `state`."""

    model_tester = None  # of each test: setUp
    training_overfit_seq_length = 32  # RoBERTa has two positions less than its table
    training_overfit_steps = 400
    # Codes jump: a straight-through gradient does not vanish where the loss is least. The loss itself falls by 90 %.
    training_grad_norm_reduction_threshold = 0.4

    family = backbone = state = ""
    test_resize_embeddings = True
    all_model_classes = ()

    def setUp(self):
        self.model_tester = Tester(self, _FAMILIES[self.family][self.backbone], self.backbone)
        config_class = self.model_tester.config_class
        self.config_tester = ConfigTester(self, config_class=config_class, **self.model_tester.fields)

    def test_config(self):
        self.config_tester.run_common_tests()


def _test_class(family: str, backbone: str, state: str) -> type:
    classes = tuple(_FAMILIES[family][backbone].values())
    if state == "packed":
        classes = tuple(packed_class(kind) for kind in classes)
    body = {"family": family, "backbone": backbone, "state": state, "all_model_classes": classes}
    for name, reason in (SKIPS[state] | BACKBONE_SKIPS.get((backbone, state), {})).items():
        body[name] = unittest.skip(reason)(getattr(LowBitModelTest, name))
    return type(
        f"{family}_{backbone}_{state}".title().replace("_", "") + "Test", (LowBitModelTest, unittest.TestCase), body
    )


for _family, _backbones in _FAMILIES.items():
    for _backbone in _backbones:
        for _state in STATES:
            _made = _test_class(_family, _backbone, _state)
            globals()[_made.__name__] = _made
