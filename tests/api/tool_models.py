"""Tiny models of every family: a byte a token, the family's markers, and a chat template that writes them."""

from functools import lru_cache

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from kvasir_engine.api.tokenizer import ServedModel, Tokenizer
from kvasir_engine.api.tools.flags import AUTO, Parsers

END = "<|im_end|>"
_BEGIN = "{% for message in messages %}<|im_start|>{{ message.role }}\n"
_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>{% endif %}"
)
_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_THINK = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _template(calls: str, end: str = _END) -> str:
    return (
        _TOOLS
        + _BEGIN
        + "{{ message.content or '' }}"
        + "{% for call in message.tool_calls or [] %}"
        + calls
        + "{% endfor %}{{ message.tool_call_id or '' }}<|im_end|>\n{% endfor %}"
        + end
    )


_HERMES = (
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>"
)
TEMPLATES: dict[str, str] = {
    "plain": _BEGIN + "{{ message.content }}<|im_end|>\n{% endfor %}" + _END,
    "hermes": _template(_HERMES),
    "qwen3": _template(_HERMES, _THINK),
    "r1": _template(_HERMES, _END + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"),
    "llama3_json": _template('<|python_tag|>{"name": "{{ call.function.name }}", "parameters": {}}'),
    "mistral": _template(
        "{% if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
        "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    ),
    "mistral array": _template('[TOOL_CALLS][{"name": "{{ call.function.name }}"}]'),
    "deepseek_v3": _template(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call.function.name }}\n```json\n"
        "{{ call.function.arguments + '' }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": _template(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>"
        "{{ call.function.arguments | tojson }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "openai": _template("<|channel|>commentary to=functions.{{ call.function.name }}<|message|>{# analysis #}"),
    "pythonic": _template("<|python_start|>[{{ call.function.name }}()]<|python_end|>"),
    "json": _template('{"name": "{{ call.function.name }}"}'),
    "qwen3_coder": _template(
        "<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments | items %}"
        "<parameter={{ key }}>\n{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>"
    ),
    "glm45": _template(
        "<tool_call>{{ call.function.name }}\n{% for key, value in call.function.arguments.items() %}"
        "<arg_key>{{ key }}</arg_key>\n<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n"
        "{% endfor %}</tool_call>"
    ),
}
_SPECIAL: dict[str, tuple[str, ...]] = {
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
    "mistral array": ("[TOOL_CALLS]",),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
    ),
    "openai": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>", "<|return|>"),
}
_SPECIAL["glm45"] = (
    "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
_SPECIAL["deepseek_v31"] = _SPECIAL["deepseek_v3"]
_PLAIN: dict[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "qwen3": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    "r1": ("<think>", "</think>"),
}
EOS = 257


@lru_cache
def family_model(family: str, parsers: Parsers = AUTO) -> ServedModel:
    """A model of the family, read as the `parsers` say."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|im_start|>", END, *_SPECIAL.get(family, ())])
    rust.add_tokens([AddedToken(each, special=False) for each in _PLAIN.get(family, ())])
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<|im_start|>", eos_token=END, chat_template=TEMPLATES[family]
    )
    tokenizer = Tokenizer(loaded)
    return ServedModel(
        "tiny", tokenizer, vocab_size=tokenizer.size, eos=(EOS,), created=1700000000, parsers=parsers
    )


def tokens_of(model: ServedModel, text: str) -> list[int]:
    """The tokens of an answer, its markers as tokens."""
    return model.tokenizer.encode(text)
