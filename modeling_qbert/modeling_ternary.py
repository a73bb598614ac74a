"""TernaryBERT (Zhang et al., EMNLP 2020) on BERT, RoBERTa and ELECTRA: 2-bit weights, 8-bit activations."""

from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)

from .configuration_qbert import TernaryBertConfig, TernaryElectraConfig, TernaryRobertaConfig
from .integration import register_family
from .modeling_lowbit import LowBitMixin


class TernaryBertModel(LowBitMixin, BertModel):
    config_class = TernaryBertConfig


class TernaryBertForMaskedLM(LowBitMixin, BertForMaskedLM):
    config_class = TernaryBertConfig


class TernaryBertForSequenceClassification(LowBitMixin, BertForSequenceClassification):
    config_class = TernaryBertConfig


class TernaryBertForTokenClassification(LowBitMixin, BertForTokenClassification):
    config_class = TernaryBertConfig


class TernaryBertForMultipleChoice(LowBitMixin, BertForMultipleChoice):
    config_class = TernaryBertConfig


class TernaryBertForQuestionAnswering(LowBitMixin, BertForQuestionAnswering):
    config_class = TernaryBertConfig


class TernaryRobertaModel(LowBitMixin, RobertaModel):
    config_class = TernaryRobertaConfig


class TernaryRobertaForMaskedLM(LowBitMixin, RobertaForMaskedLM):
    config_class = TernaryRobertaConfig


class TernaryRobertaForSequenceClassification(LowBitMixin, RobertaForSequenceClassification):
    config_class = TernaryRobertaConfig


class TernaryRobertaForTokenClassification(LowBitMixin, RobertaForTokenClassification):
    config_class = TernaryRobertaConfig


class TernaryRobertaForMultipleChoice(LowBitMixin, RobertaForMultipleChoice):
    config_class = TernaryRobertaConfig


class TernaryRobertaForQuestionAnswering(LowBitMixin, RobertaForQuestionAnswering):
    config_class = TernaryRobertaConfig


class TernaryElectraModel(LowBitMixin, ElectraModel):
    config_class = TernaryElectraConfig


class TernaryElectraForMaskedLM(LowBitMixin, ElectraForMaskedLM):
    config_class = TernaryElectraConfig


class TernaryElectraForSequenceClassification(LowBitMixin, ElectraForSequenceClassification):
    config_class = TernaryElectraConfig


class TernaryElectraForTokenClassification(LowBitMixin, ElectraForTokenClassification):
    config_class = TernaryElectraConfig


class TernaryElectraForMultipleChoice(LowBitMixin, ElectraForMultipleChoice):
    config_class = TernaryElectraConfig


class TernaryElectraForQuestionAnswering(LowBitMixin, ElectraForQuestionAnswering):
    config_class = TernaryElectraConfig


HEADS = register_family("Ternary", globals())

__all__ = [model.__name__ for heads in HEADS.values() for model in heads.values()]
