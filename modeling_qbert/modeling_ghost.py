"""GhostBERT (Huang et al., ACL 2021) on BERT, RoBERTa and ELECTRA: ghost features (see `ghost`), any bits."""

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

from .configuration_qbert import GhostBertConfig, GhostElectraConfig, GhostRobertaConfig
from .ghost import GhostMixin
from .integration import register_family


class GhostBertModel(GhostMixin, BertModel):
    config_class = GhostBertConfig


class GhostBertForMaskedLM(GhostMixin, BertForMaskedLM):
    config_class = GhostBertConfig


class GhostBertForSequenceClassification(GhostMixin, BertForSequenceClassification):
    config_class = GhostBertConfig


class GhostBertForTokenClassification(GhostMixin, BertForTokenClassification):
    config_class = GhostBertConfig


class GhostBertForMultipleChoice(GhostMixin, BertForMultipleChoice):
    config_class = GhostBertConfig


class GhostBertForQuestionAnswering(GhostMixin, BertForQuestionAnswering):
    config_class = GhostBertConfig


class GhostRobertaModel(GhostMixin, RobertaModel):
    config_class = GhostRobertaConfig


class GhostRobertaForMaskedLM(GhostMixin, RobertaForMaskedLM):
    config_class = GhostRobertaConfig


class GhostRobertaForSequenceClassification(GhostMixin, RobertaForSequenceClassification):
    config_class = GhostRobertaConfig


class GhostRobertaForTokenClassification(GhostMixin, RobertaForTokenClassification):
    config_class = GhostRobertaConfig


class GhostRobertaForMultipleChoice(GhostMixin, RobertaForMultipleChoice):
    config_class = GhostRobertaConfig


class GhostRobertaForQuestionAnswering(GhostMixin, RobertaForQuestionAnswering):
    config_class = GhostRobertaConfig


class GhostElectraModel(GhostMixin, ElectraModel):
    config_class = GhostElectraConfig


class GhostElectraForMaskedLM(GhostMixin, ElectraForMaskedLM):
    config_class = GhostElectraConfig


class GhostElectraForSequenceClassification(GhostMixin, ElectraForSequenceClassification):
    config_class = GhostElectraConfig


class GhostElectraForTokenClassification(GhostMixin, ElectraForTokenClassification):
    config_class = GhostElectraConfig


class GhostElectraForMultipleChoice(GhostMixin, ElectraForMultipleChoice):
    config_class = GhostElectraConfig


class GhostElectraForQuestionAnswering(GhostMixin, ElectraForQuestionAnswering):
    config_class = GhostElectraConfig


HEADS = register_family("Ghost", globals())

__all__ = [model.__name__ for heads in HEADS.values() for model in heads.values()]
