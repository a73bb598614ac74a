"""GhostBERT (Huang et al., ACL 2021): features made from a network's own by cheap operations.

The paper's code was never released; this is our reading of it. Y is what an output matrix of a layer gives, before
dropout, residual and LayerNorm. With ghost features it becomes

    Y + sum over f of s_f * phi(DWConv_f(Y)),    DWConv_f(Y)[i, c] = sum over t of p_fct * Y[i + t - k // 2, c],

a depthwise convolution over the tokens whose k weights p_fc are a softmax, a non-linearity phi (ReLU), and learned
factors s_fc that start at 0: a checkpoint keeps its answers until the first step of training. With one factor for all
channels of a feature training hardly used the features.

After the attention, Y is the sum over the kept heads of H_h = context_h W_O^h (and the bias). A ghost feature has one
kernel for all heads: a convolution is linear, sum_h DWConv_f(H_h) = DWConv_f(sum_h H_h), so no head's part is computed
by itself. A kernel for every pair of ghost and head would add 4.4 % of multiply-adds to MiniLM with 6 of its 12 heads.
Kept heads and ghost features together are as many as the unpruned heads. The feed-forward output is one feature and
gets one ghost feature: as many as after the attention would add 4.4 % to MiniLM with 3 heads.

Shapes: B batch, T tokens, C hidden, F ghost features, k kernel size.
"""

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .attention import MASKED
from .layers import FastDropout
from .ops import ghost_sums


PARAMETERS = (".ghost_kernel", ".ghost_scale")  # ends of their names
_running = threading.local()  # real_tokens of the layer that this thread is in


class GhostFeatures(FastDropout):
    """Adds ghost features to Y (B, T, C). It stands where the backbone has the dropout that follows Y.

    Padding is zeroed before the convolution, and rows of the batch never meet: a token sees what it would see alone.
    """

    def __init__(self, p: float, features: int, channels: int, kernel_size: int, normalization: str, activation: str):
        super().__init__(p)
        self.kernel_size, self.normalization = kernel_size, normalization
        self.activation = ACT2FN[activation]
        self.ghost_kernel = nn.Parameter(torch.empty(features, channels, kernel_size))  # logits before a softmax
        self.ghost_scale = nn.Parameter(torch.empty(features, channels))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Kernels that differ (equal ones would stay equal) and factors of 0, at which the module changes nothing."""
        self.ghost_kernel.normal_(std=1.0 if self.normalization == "softmax" else self.kernel_size**-0.5)
        self.ghost_scale.zero_()

    def kernels(self) -> Tensor:
        """Weights (F, C, k) of the convolutions; their softmax is rounded once, so that every CPU has the same."""
        if self.normalization == "none":
            return self.ghost_kernel
        return functional.softmax(self.ghost_kernel, -1, dtype=torch.float64).to(self.ghost_kernel.dtype)

    def forward(self, y: Tensor) -> Tensor:
        real = getattr(_running, "real_tokens", None)
        dtype = torch.promote_types(y.dtype, torch.float32)  # rounded once, under autocast as well
        if self.training and isinstance(self.activation, nn.ReLU):  # the same sums, and gradients in one pass
            total = ghost_sums(y.to(dtype), real, self.kernels().to(dtype), self.ghost_scale.to(dtype))
            if total is not None:
                return super().forward(total.to(y.dtype))
        source = y if real is None else y.masked_fill(~real.to(y.device).unsqueeze(-1), 0)
        half = self.kernel_size // 2
        padded = functional.pad(source.to(dtype), (0, 0, half, half))
        shifted = [padded.narrow(1, offset, y.shape[1]) for offset in range(self.kernel_size)]  # k views (B, T, C)
        total = y.to(dtype)
        # Sums of shifted tokens: conv1d with a group per channel takes twice the time, most of it backward.
        for kernel, scale in zip(self.kernels().to(dtype), self.ghost_scale.to(dtype), strict=True):
            feature = shifted[0] * kernel[:, 0]
            for offset in range(1, self.kernel_size):  # addcmul rounds once or twice, as the CPU has it
                feature = feature + shifted[offset] * kernel[:, offset]
            total = total + scale * self.activation(feature)
        return super().forward(total.to(y.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.normalization}, kernels={tuple(self.ghost_kernel.shape)}"


def real_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """Boolean (B, T), tokens that some query may attend to, from the mask that an attention gets: None, (B, T), or
    (B, heads or 1, T or 1, T), boolean or additive."""
    if attention_mask is None or attention_mask.dim() == 2:
        return None if attention_mask is None else attention_mask.bool()
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > MASKED
    return seen.any(-2).any(1)


def share_real_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:  # noqa: ARG001
    """Pre-forward hook of a layer's attention: tells the layer's ghost features which tokens are padding.

    It runs inside the layer, so that gradient checkpointing runs it again, and tells this thread only, so that threads
    may share a model.
    """
    _running.real_tokens = real_tokens(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))
