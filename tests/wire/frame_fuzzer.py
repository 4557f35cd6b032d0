"""Values made of msgspec's types as a grammar: what fits, with edges, other types and broken bytes between."""

import copy
import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

NESTED = b"\xa1x" + b"\x91" * 5000 + b"\xc0"
"""A field whose value is nested far beyond what any decoder follows, as msgpack has it."""
EDGES = (0, 1, 2, 3, 4, 7, 49, 50, 63, 64, -1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
FLOATS = (0.0, 0.5, 1.0, 30.0, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
OTHER: tuple[object, ...] = (None, True, "", "x", b"\xff", [], {}, [None], {"t": 1}, 1.5, -1, 2**64 - 1)


_type_info = cache(inspect.type_info)


class Grammar:
    """`known` are values that a field of this name is given half of the time: what the workers really have. One
    frame of fifty has a field that is nested without end."""

    def __init__(self, seed: int, known: Mapping[str, Sequence[object]]) -> None:
        self.random = random.Random(seed)
        self._known = known

    def frame(self, kinds: Sequence[type]) -> bytes:
        """A frame of one of `kinds`, as bytes; one of fifty is broken bytes."""
        built = self.build(_type_info(self.random.choice(kinds)))
        if self.random.random() < 0.3:
            self._spoil(built)
        try:
            data = bytearray(msgspec.msgpack.encode(built))
        except OverflowError:
            return b"\xc1"
        if isinstance(built, dict) and len(built) < 15 and self.random.random() < 0.02:
            data[:1] = bytes([data[0] + 1]) + NESTED  # a field that nobody knows, first
        if self.random.random() < 0.02:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def build(self, kind: inspect.Type, name: str = "") -> Any:
        """A value of a type."""
        pick = self.random
        if name in self._known and pick.random() < 0.9:
            return copy.deepcopy(pick.choice(self._known[name]))
        match kind:
            case inspect.StructType():
                return self._struct(kind)
            case inspect.UnionType():
                return self.build(pick.choice(kind.types), name)
            case inspect.IntType():
                least = max(kind.ge or 0, 0)
                return pick.choice(EDGES) if pick.random() < 0.15 else least + pick.randrange(8)
            case inspect.FloatType():
                return pick.choice(FLOATS) if pick.random() < 0.15 else pick.choice((0.0, 0.5, 1.0))
            case inspect.BoolType():
                return pick.random() < 0.5
            case inspect.StrType():
                return pick.choice(("", "a", "b", "c", "long" * 100, "\N{SNOWMAN}"))
            case inspect.BytesType():
                return pick.randbytes(pick.randrange(9))
            case inspect.LiteralType():
                return pick.choice(kind.values)
            case inspect.NoneType():
                return None
            case inspect.ListType() | inspect.VarTupleType():
                return [self.build(kind.item_type) for _ in range(pick.choice((0, 1, 2, 3, 9)))]
            case inspect.TupleType():
                return [self.build(each) for each in kind.item_types]
            case inspect.DictType():
                count = pick.choice((0, 1, 3))
                return {self.build(kind.key_type): self.build(kind.value_type) for _ in range(count)}
        raise TypeError(f"no value of {kind}")

    def _struct(self, kind: inspect.StructType) -> Any:
        pick = self.random
        fields = [each for each in kind.fields if each.required or pick.random() < 0.6]
        if kind.array_like:
            return [self.build(each.type, each.name) for each in kind.fields]
        built = {each.encode_name: self.build(each.type, each.name) for each in fields}
        return built if kind.tag is None else {str(kind.tag_field): kind.tag, **built}

    def _spoil(self, built: Any) -> None:
        """Change one place, anywhere."""
        pick, place = self.random, built
        while True:
            keys: list[Any] = list(place if isinstance(place, dict) else range(len(place)))
            if not keys:
                return
            key = pick.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and pick.random() < 0.7:
                place = place[key]
                continue
            if isinstance(place, dict) and pick.random() < 0.2:
                del place[key]
            elif isinstance(place, dict) and pick.random() < 0.1:
                place["unheard_of"] = 1
            else:
                place[key] = copy.deepcopy(pick.choice(EDGES + FLOATS + OTHER))  # which may be spoilt itself later
            return
