"""The names of the formats, vLLM's where it has one: for the command line, which loads nothing else."""

from typing import Literal, get_args

ToolParserName = Literal[
    "auto",
    "none",
    "deepseek_v3",
    "glm45",
    "hermes",
    "json",
    "llama3_json",
    "mistral",
    "openai",
    "pythonic",
    "qwen3_coder",
]
ReasoningParserName = Literal["auto", "none", "deepseek_r1", "mistral", "openai", "qwen3"]
TOOL_PARSERS: tuple[ToolParserName, ...] = get_args(ToolParserName)
REASONING_PARSERS: tuple[ReasoningParserName, ...] = get_args(ReasoningParserName)
