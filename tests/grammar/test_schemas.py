"""What comes of walking through any of 300 schemas validates, by jumps and by masks, in three vocabularies."""

import json
import random

import jsonschema
import pytest
from schema_families import FAMILIES, Schema, schemas
from vocabularies import vocabulary
from walking import matcher, text_of, walk

from kvasir_engine.protocol import Grammar

ALL = list(schemas())
KINDS = ["gpt2", "llama3", "sentencepiece"]


def test_there_are_300_schemas_and_all_are_schemas() -> None:
    assert len({json.dumps(schema) for _, schema in ALL}) > 250
    assert len(ALL) == 300
    for _, schema in ALL:
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("family", [each.__name__ for each in FAMILIES])
def test_every_finished_walk_validates(family: str) -> None:
    finished = 0
    for place, (name, schema) in enumerate(each for each in ALL if each[0].startswith(f"{family}-")):
        for turn, whitespace in enumerate([None, "", " ?"]):
            kind = KINDS[(place + turn) % len(KINDS)]
            finished += _walks(name, schema, kind, whitespace, jump=bool((place + turn) % 2))
    assert finished > 20


def _walks(name: str, schema: Schema, kind: str, whitespace: str | None, jump: bool) -> int:
    tokens = vocabulary(kind)
    begin = matcher(kind, Grammar("json_schema", json.dumps(schema), whitespace))
    walked = walk(begin, tokens, random.Random(name), jump=jump, most=300)
    after = begin.copy()
    assert all(after.accept(token) for token in walked)
    if not after.accept(tokens.eos[0]):
        return 0
    text = text_of(walked, tokens).decode()
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text, strict=True))
    return 1
