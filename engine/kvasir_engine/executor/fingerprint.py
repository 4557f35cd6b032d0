"""The fingerprint of a worker's KV, from its configuration and its model."""

from pathlib import Path

import torch

from kvasir_engine.config import EngineConfig
from kvasir_engine.kv.digests import NONE, TOKENS
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.loading.safetensors_files import weights_digest
from kvasir_engine.protocol import HEADS_APART, Fingerprint


def fingerprint_of(config: EngineConfig, folder: Path, model: ModelConfig, dtype: torch.dtype) -> Fingerprint:
    """The fingerprint of a worker that loads the model in `folder` and computes in `dtype`."""
    quantized = "" if config.quantization == "none" else f"-{config.quantization}"
    return Fingerprint(
        model=weights_digest(folder) + quantized,
        revision=config.revision,
        dtype=str(dtype).removeprefix("torch."),
        layout=HEADS_APART,
        page_size=config.page_size,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        positions=model.positions,
        tensor_parallel=config.tensor_parallel,
        digest=TOKENS if config.kv_digests else NONE,
    )
