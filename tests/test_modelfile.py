"""The Modelfile: what Ollama would send with it is what the chat template renders."""

import json
import re

import pytest

from dpost_lite.errors import ExportError
from dpost_lite.local.chat import render_chat
from dpost_lite.local.modelfile import PromptTemplate, read_template, write_modelfile
from dpost_lite.problems.prompts import PLAIN_TEMPLATE

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULTED = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{{ bos_token }}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (  # a system message stands in the first question's turn
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # refuses system messages
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = PLAIN_TEMPLATE.replace("BOS", "<s>").replace("EOS", "</s>")
# name -> template, stop tokens, whether llama.cpp adds <s>, whether a conversation comes out alike
TEMPLATES = {
    "chatml": (CHATML, ("<|im_end|>", "</s>"), False, True),
    "default system": (DEFAULTED, ("<|im_end|>", "</s>"), False, True),
    "llama 3": (LLAMA_3, ("<|eot_id|>", "</s>"), True, True),
    "gemma": (GEMMA, ("<end_of_turn>", "</s>"), True, True),
    "mistral": (MISTRAL, ("</s>",), True, False),  # a space before answers that Ollama cannot add
    "plain": (PLAIN, ("</s>",), True, True),
    "plain without bos": (PLAIN_TEMPLATE.replace("BOS", "").replace("EOS", "</s>"), ("</s>",), False, True),
}


def ollama(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """What Ollama renders: the template once per question and answer, the last time up to the answer (`Execute`)."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    rendered, turn = "", {"System": "", "Prompt": "", "Response": ""}
    names = {"system": "System", "user": "Prompt", "assistant": "Response"}
    for message in messages:
        if message["role"] == "user" and turn["Response"]:
            rendered += _execute(template, turn)
            turn = dict.fromkeys(turn, "")
        turn[names[message["role"]]] = message["content"]
    return rendered + _execute(template.partition("{{ .Response }}")[0], turn)


def _execute(template: str, values: dict[str, str]) -> str:
    branch = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", re.DOTALL)
    text = branch.sub(lambda found: found[1 if values["System"] else 2], template)
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda found: values[found[1]], text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_would_send_what_the_chat_template_renders(name: str) -> None:
    template, stops, adds_bos, has_turns = TEMPLATES[name]
    read = read_template(template, bos="<s>", stops=stops, adds_bos=adds_bos)
    question = {"role": "user", "content": "What is 2+2?"}
    more = [{"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}]
    chats = [[question], *([[question, *more]] if has_turns else [])]
    if read.before_system is not None:
        chats += [[{"role": "system", "content": "Be brief."}, *chat] for chat in chats]
    assert len(chats) >= (1 if name == "mistral" else 2)
    for chat in chats:
        sent = ollama(read.as_go(), read.default_system, chat)
        expected = render_chat(template, chat, bos="<s>", eos="</s>")
        assert ("<s>" if adds_bos else "") + sent == expected
    assert (read.default_system == "Be good.") == (name == "default system")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "there is none"),
        ("{{ messages[0]['content'] | upper }}", "it changes messages"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
    ],
)
def test_other_templates_are_refused(template: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        read_template(template, bos="", stops=(), adds_bos=False)


def test_text_that_go_would_read_as_code_is_refused() -> None:
    with pytest.raises(ExportError, match="contains"):
        PromptTemplate(None, "", "{{ Q", "", "", "").as_go()


def gguf_file(path, *, noted=None, **settings):
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<|im_end|>"])
    for key, value in settings.items():
        getattr(writer, f"add_{key}")(value)
    for key, value in (noted or {}).items():
        writer.add_string(f"dpost_lite.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    path.write_bytes(path.read_bytes() + bytes(64))  # where tensors would be
    return path


def test_the_file_has_the_template_every_stop_and_greedy_decoding(tmp_path) -> None:
    file = gguf_file(tmp_path / "m.gguf", chat_template=DEFAULTED, eos_token_id=2, eot_token_id=3, bos_token_id=1)
    write_modelfile(file, tmp_path / "Modelfile", notes=["a note"], max_new_tokens=99)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["# a note", "FROM ./m.gguf"]
    assert 'SYSTEM """Be good."""' in lines
    assert lines[-5:] == [
        f"PARAMETER stop {json.dumps('<|im_end|>')}", 'PARAMETER stop "</s>"', "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1", "PARAMETER num_predict 99",
    ]  # fmt: skip


def test_a_template_that_ollama_cannot_express_is_left_out_and_said(tmp_path) -> None:
    file = gguf_file(tmp_path / "m.gguf", chat_template="{{ messages[0]['content'] | upper }}", eos_token_id=2)
    write_modelfile(file, tmp_path / "Modelfile")
    text = (tmp_path / "Modelfile").read_text()
    assert 'TEMPLATE """' not in text
    assert "# No TEMPLATE: the model's chat template is none that Ollama can express (it changes messages)." in text
