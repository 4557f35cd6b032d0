"""What the machine provides for pods: programs for images, directories for volumes, values for references."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


def host_environment() -> dict[str, str]:
    """This process's environment without `KVASIR_*`, which would set flags of the data plane that the manifest does
    not."""
    return {k: v for k, v in os.environ.items() if not k.startswith("KVASIR_")}


@dataclass(frozen=True)
class Image:
    """What replaces an image on this machine: its entrypoint as a host command, its programs, and its ENV.

    `programs` maps the first word of a container's `command` (or of an exec probe's) to a host command.
    """

    entrypoint: tuple[str, ...]
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=lambda: {"PYTHONUNBUFFERED": "1"})


_KVASIR = (sys.executable, "-m", "kvasir_engine.entrypoints.cli")

#: The engine's image: the `kvasir` command of this Python.
ENGINE = Image(_KVASIR, programs={"kvasir": _KVASIR})


@dataclass(frozen=True)
class Host:
    """The machine as its pods see it.

    `images` maps an image reference to its command; `any_image`, when given, stands for every other one. `volumes`
    maps a volume's name to a directory and wins over the volume's own type (except an emptyDir at /dev/shm);
    `claims` does the same by PersistentVolumeClaim. `secrets` and `config_maps` hold the data, by name, of
    those that pods may refer to. `environ` is what every container starts from.
    """

    images: Mapping[str, Image] = field(default_factory=dict)
    any_image: Image | None = None
    volumes: Mapping[str, Path] = field(default_factory=dict)
    claims: Mapping[str, Path] = field(default_factory=dict)
    secrets: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    config_maps: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=host_environment)
    node_name: str = ""
    host_ip: str = "127.0.0.1"

    def command(self, reference: str, command: Sequence[str]) -> tuple[str, ...]:
        """The host's command line for a `command` in that image; () is its entrypoint. () if there is none."""
        image = self.image(reference)
        if not command:
            return image.entrypoint if image else ()
        first, *rest = command
        return (*(image.programs.get(first, (first,)) if image else (first,)), *rest)

    def image(self, reference: str) -> Image | None:
        """The command behind an image reference, or `None` when the machine has none."""
        return self.images.get(reference, self.any_image)
