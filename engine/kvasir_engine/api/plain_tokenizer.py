"""A model's tokenizer without its chat template: what a worker needs for grammars, loaded in a second.

Importing transformers takes many seconds, and here it would add nothing to `tokenizer.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvasir_engine.api.tokenizer import (
    ServedModel,
    Tokenizer,
    TokenizerError,
    load_served_model,
    read_json,
    served_by,
)


@dataclass(frozen=True)
class _PlainTokenizer:
    """The attributes of a transformers tokenizer that `Tokenizer` reads."""

    backend_tokenizer: Any
    eos_token_id: int | None
    chat_template: None = None


def load_plain_model(folder: Path) -> ServedModel:
    """The model of a resolved folder, without a chat template. Raises TokenizerError."""
    if not (folder / "tokenizer.json").is_file():
        if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            raise TokenizerError(f"there is no tokenizer in {folder}")
        return load_served_model(folder, "")  # made from other files, which transformers knows
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    settings = read_json(folder / "tokenizer_config.json")
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        for each in (settings.get("added_tokens_decoder") or {}).values():
            if each.get("special") and backend.token_to_id(each["content"]) is not None:
                backend.add_special_tokens([AddedToken(each["content"], special=True)])
        eos = settings.get("eos_token")
        name = eos.get("content") if isinstance(eos, dict) else eos
        found = backend.token_to_id(name) if isinstance(name, str) else None
        return served_by(Tokenizer(_PlainTokenizer(backend, found)), folder, "")
    except TokenizerError:
        raise
    except BaseException as error:  # as in Tokenizer.load
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise TokenizerError(f"cannot load a tokenizer from {folder}: {first}") from error
