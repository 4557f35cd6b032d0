"""The safetensors files of a model's folder: finds them, checks their lengths, reads tensors by name."""

import json
import math
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import read_json

_SAMPLE = 64 << 10
MOST_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its bytes, those of them that are not the header, its tensors' names and numbers."""

    path: Path
    size: int
    weight_bytes: int
    elements: int
    tensors: tuple[str, ...]


def check_weights(folder: Path) -> list[WeightFile]:
    """The weight files of `folder`, in order, each as long as its header says. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [_within(folder, name, index) for name in _weight_map(index)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors file")
    return [_check_file(file) for file in files]


def weights_digest(folder: Path) -> str:
    """A short name for the weights' content, the same on every machine that holds the same files.

    Covers `config.json`, and of each weight file its header and the first and last 64 KiB: enough to tell models
    and revisions apart in milliseconds, not a proof of integrity. Raises ModelError.
    """
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for weight_file in check_weights(folder):
        with weight_file.path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            digest.update(stream.read(length + _SAMPLE))
            stream.seek(max(0, weight_file.size - _SAMPLE))
            digest.update(stream.read())
    return digest.hexdigest()


def _weight_map(index: Path) -> list[str]:
    """The names of files in an index, each once, in order."""
    shown = read_json(index).get("weight_map")
    if not isinstance(shown, dict) or not all(isinstance(name, str) for name in shown.values()):
        raise ModelError(f"{index}: weight_map names no files")
    return sorted(set(shown.values()))


def _within(folder: Path, name: str, index: Path) -> Path:
    """The file of this name in the folder; refuses paths outside it, which a model's author may have written."""
    if not name.endswith(".safetensors") or Path(name).name != name or name.startswith("."):
        raise ModelError(f"{index}: weight_map names {name[:200]!r}, which is no safetensors file of this folder")
    return folder / name


def _check_file(path: Path) -> WeightFile:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if size - 8 >= length > MOST_HEADER_BYTES:
                raise ModelError(f"{path}: a header of {length} bytes is more than {MOST_HEADER_BYTES}")
            if length > size - 8:
                raise ModelError(f"{path} is cut short: {size} bytes do not hold its header")
            header: dict[str, Any] = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            if not all(_is_entry(entry) for entry in tensors.values()):
                raise ValueError
            elements = sum(math.prod(entry["shape"]) for entry in tensors.values())
            end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path} is no safetensors file: its header cannot be read") from None
    if size != end:
        raise ModelError(
            f"{path} is {'cut short' if size < end else 'too long'}: {size} bytes, its header says {end}"
        )
    return WeightFile(path, size, size - 8 - length, elements, tuple(tensors))


def _is_entry(entry: dict[str, Any]) -> bool:
    numbers = [*entry["shape"], *entry["data_offsets"]]
    return len(entry["data_offsets"]) == 2 and all(type(each) is int and 0 <= each < 2**63 for each in numbers)
