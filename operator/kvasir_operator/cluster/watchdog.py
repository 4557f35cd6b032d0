"""PURE: detects watches that have died without an error, by comparing lists with the events that came.

A watch is dead when two comparisons in a row find an object at another version than its newest event has, and no
event of the object came between them. A watch that is only late has moved by the second comparison. An object that
is no longer listed proves nothing: a watch that was interrupted and lists again sends no event of what was deleted.
"""

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Watchdog(Generic[Key]):
    """Follows one watch. Versions are resourceVersions, of which only equality is used."""

    def __init__(self) -> None:
        self._versions: dict[Key, str] = {}
        self._suspects: dict[Key, str | None] = {}
        self._gone: set[Key] = set()

    def event(self, key: Key, version: str, deleted: bool = False) -> None:
        """The watch sent an event of an object."""
        self._suspects.pop(key, None)
        if deleted:
            self._versions.pop(key, None)
        else:
            self._versions[key] = version

    def compare(self, listed: Mapping[Key, str]) -> set[Key]:
        """The objects of which the watch has sent no event since the last comparison, given the versions listed."""
        suspects = {
            key: self._versions.get(key) for key, version in listed.items() if self._versions.get(key) != version
        }
        silent = {
            key for key, version in suspects.items() if key in self._suspects and self._suspects[key] == version
        }
        self._suspects = suspects
        gone = self._versions.keys() - listed.keys()
        for key in gone & self._gone:
            del self._versions[key]
        self._gone = gone
        return silent
