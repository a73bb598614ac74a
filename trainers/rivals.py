"""What others make of the same weights on the CPU: the int8 engines and PyTorch itself, for `qbert bench`.

Every rival is a row of `RIVALS`: the packages it needs and a function that prepares it from one full-precision model.
Prepared files stay in a folder that belongs to the weights, so that a second run starts at once.

Shapes: B batch, T tokens, L labels.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


Inputs = Mapping[str, Tensor]  # input_ids, attention_mask and token_type_ids, int64 (B, T)
Answer = Callable[[Inputs], object]  # logits (B, L) as tensor or array
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
CALIBRATION_BATCHES = 16  # of NNCF's activation ranges


class NotInstalledError(RuntimeError):
    """A rival's package is missing; the text says which and how to get it."""


class Rival(NamedTuple):
    """`prepare(model, folder, threads)`; `packages` are import names."""

    packages: tuple[str, ...]
    prepare: Callable[[PreTrainedModel, Path, int], Answer]


class _Logits(nn.Module):
    """Positional inputs to logits alone, as exporters want it."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


def example(vocabulary: int, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids without padding, (B, T)."""
    ids = torch.randint(1, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@contextmanager
def _quietly():
    """Exporters and quantizers warn about their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _onnx_file(model: PreTrainedModel, folder: Path) -> Path:
    path = folder / "fp32.onnx"
    if not path.exists():
        eager = copy.deepcopy(model).eval()
        eager.set_attn_implementation("eager")  # the graph that ONNX Runtime's fusions look for
        inputs = example(model.config.vocab_size, 2, 16)
        with _quietly():
            torch.onnx.export(
                _Logits(eager),
                tuple(inputs.values()),
                folder / "partial.onnx",
                input_names=list(INPUTS),
                output_names=["logits"],
                dynamic_axes=dict.fromkeys(INPUTS, {0: "batch", 1: "tokens"}),
                opset_version=17,
                dynamo=False,
            )
        (folder / "partial.onnx").rename(path)
    return path


def saturates() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which saturate: AVX2 without VNNI, as Linux tells."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}


def onnxruntime_file(folder: Path) -> Path:
    return folder / f"onnxruntime-int{7 if saturates() else 8}.onnx"


def prepare_onnxruntime(model: PreTrainedModel, folder: Path, threads: int) -> Answer:
    """ONNX Runtime: its BERT fusions (attention, skip + LayerNorm, bias + GELU, embedding), dynamic int8 weights; in
    the range of 7 bits where sums would saturate, as its documentation asks for."""
    import onnxruntime

    path = onnxruntime_file(folder)
    if not path.exists():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers import optimizer

        config = model.config
        with _quietly():
            fused = optimizer.optimize_model(
                str(_onnx_file(model, folder)),
                model_type="bert",
                num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
                opt_level=0,
            )
            if fused.get_fused_operator_statistics()["Attention"] != config.num_hidden_layers:
                raise RuntimeError(
                    "ONNX Runtime's optimizer did not fuse every attention: it would be measured too slow"
                )
            fused.save_model_to_file(str(folder / "fused.onnx"))
            quantize_dynamic(
                folder / "fused.onnx",
                folder / "partial.onnx",
                weight_type=QuantType.QInt8,
                reduce_range=saturates(),
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # shapes end at its own fused operators
            )
        (folder / "partial.onnx").rename(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: inputs[name].numpy() for name in INPUTS})[0]


def prepare_openvino(model: PreTrainedModel, folder: Path, threads: int) -> Answer:
    """OpenVINO, int8 by NNCF's post-training quantization for transformers."""
    import openvino

    path = folder / "openvino-int8.xml"
    if not path.exists():
        import nncf

        config = model.config
        batches = [example(config.vocab_size, 1, 128, seed) for seed in range(CALIBRATION_BATCHES)]
        with _quietly():
            network = openvino.convert_model(str(_onnx_file(model, folder)))
            rows = nncf.Dataset([{name: part.numpy() for name, part in batch.items()} for batch in batches])
            network = nncf.quantize(
                network, rows, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_BATCHES
            )
            openvino.save_model(network, folder / "partial.xml")
        (folder / "partial.bin").rename(path.with_suffix(".bin"))
        (folder / "partial.xml").rename(path)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer({name: inputs[name].numpy() for name in INPUTS})[0].copy()


def _torch_answer(model: nn.Module) -> Answer:
    return torch.no_grad()(lambda inputs: model(**inputs).logits)


def prepare_fp32(model: PreTrainedModel, folder: Path, threads: int) -> Answer:  # noqa: ARG001 (as every rival)
    """PyTorch as Transformers runs it."""
    return _torch_answer(copy.deepcopy(model).eval())


def prepare_bfloat16(model: PreTrainedModel, folder: Path, threads: int) -> Answer:  # noqa: ARG001
    return _torch_answer(copy.deepcopy(model).eval().to(torch.bfloat16))


def prepare_dynamic(model: PreTrainedModel, folder: Path, threads: int) -> Answer:  # noqa: ARG001
    """torch.ao's dynamic int8 of every linear layer."""
    with _quietly():
        return _torch_answer(torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).eval(), {nn.Linear}))


RIVALS = {
    "PyTorch fp32": Rival((), prepare_fp32),
    "PyTorch bf16": Rival((), prepare_bfloat16),
    "torch dynamic int8": Rival((), prepare_dynamic),
    "ONNX Runtime int8": Rival(("onnx", "onnxruntime"), prepare_onnxruntime),
    "OpenVINO int8": Rival(("onnx", "openvino", "nncf"), prepare_openvino),
}
TO_BEAT = ("ONNX Runtime int8", "OpenVINO int8")  # a ratio is to the faster of them


def prepare(name: str, model: PreTrainedModel, folder: Path, threads: int) -> Answer:
    """A rival ready to answer with `threads` threads.

    Raises:
        NotInstalledError: a package of it is missing.
    """
    rival = RIVALS[name]
    missing = [package for package in rival.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise NotInstalledError(f"{name}: {', '.join(missing)} not installed; pip install 'qbert-zoo[bench]'")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    return rival.prepare(model, folder, threads)


def similarity(a: object, b: object) -> float:
    """Correlation of two sets of logits (B, L), each sentence's mean taken off."""
    a, b = (np.asarray(torch.as_tensor(x).float(), dtype=np.float64) for x in (a, b))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
