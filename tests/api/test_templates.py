"""Chat templates and tokenizer files of a hostile author: each ends in an error, in bounded time and memory."""

import json
import os
import signal
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from api_support import TEMPLATE, tiny_tokenizer

from kvasir_engine.api.chat_template import Renderers, TemplateCost, TemplateError, TemplateLimits
from kvasir_engine.api.rendering import template_variables
from kvasir_engine.api.tokenizer import TokenizerError, load_served_model

HELLO = [{"role": "user", "content": "Hi"}]
LIMITS = TemplateLimits(seconds=0.5, patience=60.0, memory=256 * 2**20, characters=2**20)
COSTLY = {
    "a loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}",
    "a long string": "{{ 'x' * 4400000000 }}",
    "a string that is not shown": "{% set x = 'x' * 4400000000 %}{{ x | length }}",
    "a list": "{% set x = [0] * 900000000 %}{{ x | length }}",
    "a number": "{{ (10 ** 100000000) | string | length }}",
    "a wide format": "{{ '%4400000000d' % 1 }}",
    "a wide format by method": "{{ '{:>4400000000}'.format(1) }}",
    "a doubled string": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "much text": "{% for i in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a deep nest": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}
REFUSED = {
    "the sandbox's way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "no template": "{% for %}",
    "its own words": "{{ raise_exception('no') }}",
}


@pytest.fixture(scope="module")
def renderers() -> Any:
    made = Renderers(LIMITS)
    yield made
    made.close()


@pytest.mark.parametrize("name", COSTLY)
def test_a_template_that_takes_too_much_is_ended_and_the_next_is_rendered(renderers: Renderers, name: str) -> None:
    with pytest.raises(TemplateError):
        renderers.render(COSTLY[name], HELLO, {})
    assert renderers.render(TEMPLATE, HELLO, {}) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_may_not_do_is_its_error(renderers: Renderers, name: str) -> None:
    with pytest.raises(TemplateError) as caught:
        renderers.render(REFUSED[name], HELLO, {})
    assert not isinstance(caught.value, TemplateCost)


@pytest.mark.parametrize("template", [*COSTLY.values(), "{% autoescape 'x' * 4400000000 %}{% endautoescape %}"])
def test_nothing_of_a_template_is_computed_where_its_variables_are_looked_for(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + "{{ mine }}"
    tracemalloc.start()
    try:
        assert template_variables(tokenizer) in ({"mine"}, frozenset())
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_loop_that_nothing_interrupts_is_killed() -> None:
    renderers = Renderers(TemplateLimits(seconds=1000, patience=0.5, memory=LIMITS.memory))
    renderers.render(TEMPLATE, HELLO, {})
    with pytest.raises(TemplateCost, match=r"does not end within 0\.5 s"):
        renderers.render(COSTLY["a loop"], HELLO, {})
    assert renderers.render("{{ messages[0].content }}", HELLO, {}) == "Hi"
    renderers.close()


def test_a_process_that_is_killed_is_that_request_s_error(renderers: Renderers) -> None:
    renderers.render(TEMPLATE, HELLO, {})
    children = _children()
    killer = threading.Timer(0.2, lambda: [os.kill(each, signal.SIGKILL) for each in children])
    killer.start()
    with pytest.raises(TemplateCost):
        renderers.render(COSTLY["a loop"], HELLO, {})
    killer.join()
    assert "Hi" in renderers.render(TEMPLATE, HELLO, {})


def _children() -> list[int]:
    path = Path(f"/proc/{os.getpid()}/task")
    found = {int(each) for task in path.iterdir() for each in (task / "children").read_text().split()}
    return [each for each in found if "template_process" in Path(f"/proc/{each}/cmdline").read_text()]


def test_long_messages_pass_in_both_directions(renderers: Renderers) -> None:
    text = "€" * 900_000
    assert renderers.render("{{ messages[0].content }}", [{"role": "user", "content": text}], {}) == text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 258, "model_type": "llama"}))
    return tmp_path


def _edit(path: Path, **change: object) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **change}))


HOSTILE: dict[str, Any] = {
    "a class of its own code": lambda f: (
        _edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
        (f / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"),
    ),
    "a model of its own code": lambda f: (
        _edit(f / "config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"),
        (f / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"),
    ),
    "a nested tokenizer_config": lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
    "a nested config": lambda f: (f / "config.json").write_text('{"a":' * 100_000),
    "a nested tokenizer": lambda f: (f / "tokenizer.json").write_text('{"model":' * 100_000),
    "an empty tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "a list for a config": lambda f: (f / "tokenizer_config.json").write_text("[]"),
    "a template that loops": lambda f: (f / "chat_template.jinja").write_text(COSTLY["a loop"]),
    "a template that grows": lambda f: (f / "chat_template.jinja").write_text(COSTLY["a long string"]),
    "a token of another kind": lambda f: _edit(f / "tokenizer_config.json", eos_token=[1, {"a": 2}]),
    "a length of another kind": lambda f: _edit(f / "tokenizer_config.json", model_max_length={"a": "b"}),
    "added tokens of another kind": lambda f: _edit(f / "tokenizer_config.json", added_tokens_decoder={"x": 1}),
    "a class that is none": lambda f: _edit(f / "tokenizer_config.json", tokenizer_class={"a": 1}),
}


def _outcome(folder: Path) -> str:
    """What is said of a model folder: how it fails, or that it serves as if the hostile value were not there."""
    try:
        load_served_model(folder, "tiny").tokenizer.chat(HELLO)
    except (TokenizerError, TemplateError) as error:
        return str(error)
    return "served"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line_and_run_nothing(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    HOSTILE[name](folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    assert len(_outcome(folder).splitlines()) == 1
    assert not (folder / "ran").exists()
