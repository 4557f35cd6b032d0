"""PURE: notices watches that died in silence, by comparing what was listed with what the events told.

A watch is dead when two looks in a row find an object that is another than the newest event said, and no event of
it came between them. A watch that is merely behind has moved by the second look. What is no longer listed proves
nothing: a watch that was cut off and listed anew does not tell of what went meanwhile.
"""

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Watchdog(Generic[Key]):
    """Follows one watch. Versions are resourceVersions, of which only equality is used."""

    def __init__(self) -> None:
        self._told: dict[Key, str] = {}
        self._suspects: dict[Key, str | None] = {}
        self._gone: set[Key] = set()

    def event(self, key: Key, version: str, deleted: bool = False) -> None:
        """The watch told of an object."""
        self._suspects.pop(key, None)
        if deleted:
            self._told.pop(key, None)
        else:
            self._told[key] = version

    def look(self, listed: Mapping[Key, str]) -> set[Key]:
        """The objects about which the watch has been silent since the last look, given the versions there are."""
        suspects = {key: self._told.get(key) for key, version in listed.items() if self._told.get(key) != version}
        silent = {key for key, told in suspects.items() if key in self._suspects and self._suspects[key] == told}
        self._suspects = suspects
        gone = self._told.keys() - listed.keys()
        for key in gone & self._gone:
            del self._told[key]
        self._gone = gone
        return silent
