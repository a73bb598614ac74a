"""BinaryBERT (Bai et al., ACL 2021) on BERT, RoBERTa and ELECTRA: 1-bit weights in one plane or, split, in two."""

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

from .configuration_qbert import BinaryBertConfig, BinaryElectraConfig, BinaryRobertaConfig
from .integration import register_family
from .modeling_lowbit import LowBitMixin


class BinaryBertModel(LowBitMixin, BertModel):
    config_class = BinaryBertConfig


class BinaryBertForMaskedLM(LowBitMixin, BertForMaskedLM):
    config_class = BinaryBertConfig


class BinaryBertForSequenceClassification(LowBitMixin, BertForSequenceClassification):
    config_class = BinaryBertConfig


class BinaryBertForTokenClassification(LowBitMixin, BertForTokenClassification):
    config_class = BinaryBertConfig


class BinaryBertForMultipleChoice(LowBitMixin, BertForMultipleChoice):
    config_class = BinaryBertConfig


class BinaryBertForQuestionAnswering(LowBitMixin, BertForQuestionAnswering):
    config_class = BinaryBertConfig


class BinaryRobertaModel(LowBitMixin, RobertaModel):
    config_class = BinaryRobertaConfig


class BinaryRobertaForMaskedLM(LowBitMixin, RobertaForMaskedLM):
    config_class = BinaryRobertaConfig


class BinaryRobertaForSequenceClassification(LowBitMixin, RobertaForSequenceClassification):
    config_class = BinaryRobertaConfig


class BinaryRobertaForTokenClassification(LowBitMixin, RobertaForTokenClassification):
    config_class = BinaryRobertaConfig


class BinaryRobertaForMultipleChoice(LowBitMixin, RobertaForMultipleChoice):
    config_class = BinaryRobertaConfig


class BinaryRobertaForQuestionAnswering(LowBitMixin, RobertaForQuestionAnswering):
    config_class = BinaryRobertaConfig


class BinaryElectraModel(LowBitMixin, ElectraModel):
    config_class = BinaryElectraConfig


class BinaryElectraForMaskedLM(LowBitMixin, ElectraForMaskedLM):
    config_class = BinaryElectraConfig


class BinaryElectraForSequenceClassification(LowBitMixin, ElectraForSequenceClassification):
    config_class = BinaryElectraConfig


class BinaryElectraForTokenClassification(LowBitMixin, ElectraForTokenClassification):
    config_class = BinaryElectraConfig


class BinaryElectraForMultipleChoice(LowBitMixin, ElectraForMultipleChoice):
    config_class = BinaryElectraConfig


class BinaryElectraForQuestionAnswering(LowBitMixin, ElectraForQuestionAnswering):
    config_class = BinaryElectraConfig


HEADS = register_family("Binary", globals())

__all__ = [model.__name__ for heads in HEADS.values() for model in heads.values()]
