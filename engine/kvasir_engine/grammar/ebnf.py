"""Translates EBNF as llama.cpp's GBNF and xgrammar write it to Lark's syntax.

llguidance translates it. It needs each rule on one line and knows no `\\u` escapes, so this module first joins
lines, drops comments and replaces escapes by their characters.
"""

import re

from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from kvasir_engine.grammar.base import GrammarError

_TOKEN = re.compile(
    r"""(?P<literal>"(?:[^"\\\n]|\\.)*")"""
    r"""|(?P<set>\[(?:[^\]\\\n]|\\.)*\])"""
    r"""|(?P<comment>\#[^\n]*)"""
    r"""|(?P<head>[A-Za-z_][\w-]*[ \t]*::=)"""
    r"""|(?P<space>\s+)"""
    r"""|(?P<other>.)""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_KEPT = {"n": "\n", "r": "\r", "t": "\t", **{character: character for character in "\"\\[]-^'/"}}
_SHOWN = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\\": r"\\"}


def ebnf_to_lark(source: str) -> str:
    """The grammar in Lark's syntax; a source that is Lark already is returned. Raises GrammarError."""
    if is_lark_syntax(source):
        return source
    lines: list[str] = []
    for token in _TOKEN.finditer(source):
        text = token[0]
        match token.lastgroup:
            case "head":
                lines.append(text)
            case "comment" | "space":
                text = " "
            case "literal":
                text = '"' + _characters(text[1:-1], '"') + '"'
            case "set":
                text = "[" + _characters(text[1:-1], "[]", in_set=True) + "]"
        if token.lastgroup == "head":
            continue
        if not lines:
            if text.strip():
                raise GrammarError("", f"expected a rule, 'name ::= ...', got {text[:40]!r}")
            continue
        lines[-1] += text
    try:
        return gbnf_to_lark("\n".join(line.strip() for line in lines) + "\n")
    except RecursionError:
        raise GrammarError("", "it is nested too deeply") from None
    except Exception as error:  # of the library's parser, which has one of its own and plain ones
        first = (str(error).splitlines() or ["it cannot be read"])[0]
        raise GrammarError("", first[:300].rstrip(".")) from None


def _characters(text: str, quoted: str, in_set: bool = False) -> str:
    """`text` with its escapes replaced, except those that the library and Lark need."""
    out, at = [], 0
    while at < len(text):
        escape = _ESCAPE.match(text, at)
        if escape is None:
            out.append(text[at])
            at += 1
            continue
        code = escape[1] or escape[2] or escape[3]
        try:
            character = chr(int(code, 16)) if code else _KEPT[escape[4]]
            character.encode()
        except (KeyError, ValueError, OverflowError):
            raise GrammarError("", f"the escape {escape[0]!r} is not known") from None
        if character in _SHOWN:
            out.append(_SHOWN[character])
        elif character in quoted:
            out.append("\\" + character)
        elif in_set and character in "-^":
            out.append(rf"\x{ord(character):02x}")
        else:
            out.append(character)
        at = escape.end()
    return "".join(out)
