"""What rendering needs to know beside the spec."""

import msgspec


class PodWatch(msgspec.Struct, frozen=True):
    """The router finds workers by watching the pods of its namespace."""


class Static(msgspec.Struct, frozen=True):
    """The router is told its workers' URLs (`http://host:port`), and needs no API server."""

    urls: tuple[str, ...]


Discovery = PodWatch | Static


class Options(msgspec.Struct, frozen=True):
    """`engine_image` runs every data-plane pod. `discovery`: how the router finds workers."""

    engine_image: str = "kvasir-engine:latest"
    discovery: Discovery = PodWatch()
