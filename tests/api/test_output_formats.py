"""Which format a model writes is told from its chat template, or by flags."""

import pytest
from tool_models import TEMPLATES

from kvasir_engine.api.tools.flags import Parsers, parsers
from kvasir_engine.api.tools.formats import OutputFormat, output_format
from kvasir_engine.errors import UserError

# What tells them apart in templates as they are published, by model.
PUBLISHED = {
    "Qwen3": "{%- if tools %}return json within <tool_call></tool_call>{% endif %}{{ '<think>\\n\\n</think>' }}",
    "Qwen2.5": "{%- if tools %}within <tool_call></tool_call> XML tags{% endif %}<|im_start|>",
    "Qwen3-Coder": "{%- if tools %}<tool_call>\n<function=example>\n<parameter=a>{% endif %}",
    "GLM-4.5": "{%- if tools %}<tool_call>{name}\n<arg_key>{% endif %}</think>",
    "Llama-3.1": "{%- if builtin_tools %}<|python_tag|>{% endif %}{% if tools %}<|start_header_id|>{% endif %}",
    "Llama-3.2": '<|start_header_id|>{%- if tools %}{"name": function name, "parameters": dictionary}{% endif %}',
    "Mistral-v3": "{%- if tools %}[AVAILABLE_TOOLS]{% endif %}{{ '[TOOL_CALLS] [' }}",
    "Magistral": "{%- if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]{{ name }}[ARGS][THINK]",
    "DeepSeek-R1": "{% for call in message['tool_calls'] %}<｜tool▁call▁begin｜>```json{{ x.split('</think>') }}",
    "DeepSeek-V3": "{% if tools %}{% endif %}{% for call in message['tool_calls'] %}<｜tool▁call▁begin｜>```json",
    "DeepSeek-V3.1": "{% if tools %}<｜tool▁call▁begin｜>{% endif %}<｜Assistant｜>{{ '</think>' }}",
    "gpt-oss": "{%- if tools %}{% endif %}<|start|>assistant<|channel|>analysis<|message|>",
    "SmolLM2": "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}",
    "none": "",
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen3", OutputFormat("hermes", "qwen3", newer=True)),
        ("Qwen2.5", OutputFormat("hermes", "none", newer=True)),
        ("Qwen3-Coder", OutputFormat("qwen3_coder", "none", newer=True)),
        ("GLM-4.5", OutputFormat("glm45", "qwen3", newer=True)),
        ("Llama-3.1", OutputFormat("llama3_json", "none", newer=True)),
        ("Llama-3.2", OutputFormat("llama3_json", "none", newer=True)),
        ("Mistral-v3", OutputFormat("mistral", "none")),
        ("Magistral", OutputFormat("mistral", "mistral", newer=True)),
        ("DeepSeek-R1", OutputFormat("hermes", "qwen3", tools_in_system_message=True)),
        ("DeepSeek-V3", OutputFormat("deepseek_v3", "none")),
        ("DeepSeek-V3.1", OutputFormat("deepseek_v3", "qwen3", newer=True)),
        ("gpt-oss", OutputFormat("openai", "openai", newer=True)),
        ("SmolLM2", OutputFormat("hermes", "none", tools_in_system_message=True, newer=True)),
        ("none", OutputFormat("hermes", "none", tools_in_system_message=True, newer=True)),
    ],
)
def test_published_templates_are_told_apart(model: str, expected: OutputFormat) -> None:
    assert output_format(PUBLISHED[model]) == expected


def test_the_stand_ins_are_told_apart() -> None:
    read = {family: output_format(template).tools for family, template in TEMPLATES.items()}
    assert read == {
        "plain": "hermes",
        "hermes": "hermes",
        "qwen3": "hermes",
        "r1": "hermes",
        "llama3_json": "llama3_json",
        "mistral": "mistral",
        "mistral array": "mistral",
        "deepseek_v3": "deepseek_v3",
        "deepseek_v31": "deepseek_v3",
        "openai": "openai",
        "pythonic": "pythonic",
        "json": "json",
        "qwen3_coder": "qwen3_coder",
        "glm45": "glm45",
    }


def test_flags_name_parsers() -> None:
    assert parsers("hermes", "none") == Parsers("hermes", "none")
    assert output_format(PUBLISHED["Qwen3"], "mistral", "none") == OutputFormat("mistral", "none")
    assert output_format("", "none").tools_in_system_message is False
    # the message that tells of tools is in the form of hermes
    assert output_format(PUBLISHED["SmolLM2"], "hermes").tools_in_system_message is True
    assert output_format(PUBLISHED["SmolLM2"], "mistral") == output_format(PUBLISHED["SmolLM2"], "none")
    for tools, reasoning in (("hermse", "auto"), ("auto", "r1"), ("", "auto")):
        with pytest.raises(UserError, match="parser is one of"):
            parsers(tools, reasoning)
