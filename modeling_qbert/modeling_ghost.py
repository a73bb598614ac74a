"""GhostBERT (Huang et al., ACL 2021) on BERT, RoBERTa and ELECTRA: ghost features (see `ghost`), any bits."""

from torch import nn
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

from .checkpoint import CheckpointError
from .configuration_qbert import GhostBertConfig, GhostElectraConfig, GhostRobertaConfig
from .ghost import PARAMETERS, GhostFeatures, share_real_tokens
from .integration import register_family
from .modeling_lowbit import LowBitMixin


class GhostMixin(LowBitMixin):
    """`LowBitMixin` with ghost features after the attention, the feed-forward network, both or neither.

    Their kernels stay in full precision. A checkpoint without any starts them as new.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for layer in self.base_model.encoder.layer:
            self._insert_ghosts(layer.attention.output, config.attention_ghosts)
            self._insert_ghosts(layer.output, config.feed_forward_ghosts)
            if config.feed_forward_ghosts:
                layer.chunk_size_feed_forward = 0  # a chunk of tokens lacks the neighbours that a convolution sees
            if config.attention_ghosts or config.feed_forward_ghosts:
                layer.attention.register_forward_pre_hook(share_real_tokens, with_kwargs=True)

    def _insert_ghosts(self, output: nn.Module, features: int) -> None:
        if features:
            output.dropout = GhostFeatures(
                output.dropout.p,
                features,
                self.config.hidden_size,
                self.config.ghost_kernel_size,
                self.config.ghost_normalization,
                self.config.ghost_activation,
            )

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        foreign = sorted(name for name in loading_info.unexpected_keys if name.endswith(PARAMETERS))
        if foreign:
            raise CheckpointError(f"{len(foreign)} tensors of ghost features that the config lacks: {foreign[:3]}")
        ghosts = {name for name in self.state_dict() if name.endswith(PARAMETERS)}
        if ghosts <= set(loading_info.missing_keys):
            for module in self.modules():
                if isinstance(module, GhostFeatures):
                    module.reset()
            loading_info.missing_keys = loading_info.missing_keys - ghosts
        super()._adjust_missing_and_unexpected_keys(loading_info)


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
