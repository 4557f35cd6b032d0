"""What int8 weights cost in accuracy: SmolLM2 over this repository's own documents, beside bfloat16.

    python -m bench.quantization

Prints the perplexity of both, how often the likeliest token is the same, and the mean Kullback-Leibler divergence
from bfloat16's distribution.
"""

from pathlib import Path

import torch
from bench.systems import MODEL
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from kvasir_engine.executor.model_runner import ModelRunner, Quantization
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.model.loading.resolver import resolve

SEQUENCES, TOKENS, PAGE = 16, 160, 16
DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"


def prompts(folder: Path) -> torch.Tensor:
    """[SEQUENCES, TOKENS] ids from the beginnings of as many parts of the documents."""
    text = "\n".join(file.read_text() for file in sorted(DOCUMENTS.glob("*.md")))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text)["input_ids"])
    return torch.stack([part[:TOKENS] for part in ids.chunk(SEQUENCES)])


def logprobs(folder: Path, quantization: Quantization, tokens: torch.Tensor) -> torch.Tensor:
    """[TOKENS, SEQUENCES, vocabulary] after each token."""
    pages = TOKENS // PAGE
    runner = ModelRunner(folder, device="cpu", pages=SEQUENCES * pages, page_size=PAGE, quantization=quantization)
    table = torch.arange(SEQUENCES * pages).view(SEQUENCES, pages)
    found = []
    for place in range(TOKENS):
        positions, contexts = torch.full((SEQUENCES,), place), [place + 1] * SEQUENCES
        batch = ForwardBatch(tokens[:, place].contiguous(), positions, [1] * SEQUENCES, contexts, table)
        found.append(runner.forward(batch).log_softmax(-1))
    return torch.stack(found)


def main() -> None:
    """See the module's docstring."""
    folder = resolve(MODEL)
    tokens = prompts(folder)
    plain, quantized = (logprobs(folder, kind, tokens) for kind in ("none", "int8"))
    following = tokens.T[1:, :, None]
    table = Table("weights", "perplexity", "same likeliest token", "mean KL divergence")
    for name, own in (("bfloat16", plain), ("int8", quantized)):
        perplexity = own[:-1].gather(-1, following).mean().neg().exp()
        same = (own.argmax(-1) == plain.argmax(-1)).float().mean()
        divergence = (plain.exp() * (plain - own)).sum(-1).mean()
        table.add_row(name, f"{perplexity:.3f}", f"{same:.1%}", f"{divergence:.4f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    print(f"{SEQUENCES} sequences of {TOKENS} tokens")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
