"""The chat template's options of a request."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What the template's own surroundings are called; a caller's are others.
_RESERVED = frozenset({"messages", "tools", "documents", "raise_exception", "strftime_now", "conversation"})


@dataclass(frozen=True)
class Rendering:
    """How the chat template is rendered. `variables` are the caller's, among those that the template uses."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None


AS_USUAL = Rendering()


def template_variables(hf_tokenizer: Any) -> frozenset[str]:
    """The variables of a tokenizer's chat template that a caller may set, such as `enable_thinking`."""
    template = hf_tokenizer.chat_template
    if not isinstance(template, str):
        return frozenset()
    try:
        found = _undeclared(template)
    except (ValueError, RecursionError):  # the renderer says what is wrong
        return frozenset()
    parameters = inspect.signature(hf_tokenizer.apply_chat_template).parameters
    return frozenset(found) - _RESERVED - set(parameters) - set(hf_tokenizer.special_tokens_map)


def _undeclared(template: str) -> set[str]:
    """The variables that a template takes from outside. Raises ValueError.

    Evaluates nothing: Jinja folds constant expressions while it looks for names, and one may make some GB, without
    a bound in this process. So the constants are replaced first.
    """
    from jinja2 import Environment, TemplateError, meta, nodes
    from jinja2.visitor import NodeTransformer

    class WithoutConstants(NodeTransformer):
        def visit_Const(self, node: nodes.Const) -> nodes.Node:
            return nodes.ContextReference()

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(WithoutConstants().visit(environment.parse(template)))
    except TemplateError as error:  # also of transformers' own extension, which marks what assistants said
        raise ValueError(str(error)) from None


def template_text(hf_tokenizer: Any) -> str:
    """A tokenizer's chat template, or all of them joined where it has several."""
    template = hf_tokenizer.chat_template
    if isinstance(template, Mapping):
        return "\n".join(str(each) for each in template.values())
    return template if isinstance(template, str) else ""
