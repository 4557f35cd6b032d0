"""Qwen3-Coder's: `<tool_call>`, `<function=NAME>`, `<parameter=KEY>` and a value on lines of its own, and the
ends of all three.
"""

from kvasir_engine.api.tools.xml_calls import XmlFormat

FORM = XmlFormat(
    name="<function=",
    name_end=">",
    key="<parameter=",
    key_end=">",
    value="",
    value_end="</parameter>",
    call_end="</function>",
    trims=True,
)
