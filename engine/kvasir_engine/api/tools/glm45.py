"""GLM's since 4.5: `<tool_call>NAME`, then `<arg_key>KEY</arg_key>` and `<arg_value>VALUE</arg_value>` for each
argument, each on a line of its own, and `</tool_call>`.
"""

from kvasir_engine.api.tools.xml_calls import CLOSE, XmlFormat

FORM = XmlFormat(
    name="",
    name_end="",
    key="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
    call_end=CLOSE,
)
