"""Chat templates: how a conversation becomes a prompt.

``"demo"`` and ``"eval"`` are the released code's: the first works with any tokenizer, the second
uses the turn tokens of InternLM2. ``"paper"`` is the protocol that the paper prints: the image,
``User:``, ``Assistant:`` and a stop token, with single blanks between. What the model has to say,
its stop token included, stands in a ``generation`` block, which is where training takes its loss
from. ``<objects>`` is where the processor puts the image's object text.

The others are LLaVA's, byte for byte what its training code makes of a conversation. An image
stands in the turn that holds it, on a line of its own. Where LLaVA writes ``</s>`` and, between
the turns of ``"llama_2"``, ``<s>``, the tokenizer's own stop and start tokens stand; for a LLaMA's
they are these. The start of the whole is the tokenizer's to put. ``"v0"`` is the form that LLaVA
trains on (``S``, a blank line, ``### Human: U``, ``### Assistant: A``, ``###``), for prompts too:
``S###Human: U###Assistant:``, which its chat code asks with, no model has seen in training.
"""

from __future__ import annotations

import re

IMAGE_TOKEN = "<image>"
OBJECTS_MARKER = "<objects>"
SYSTEM = (
    "AI assistant should give helpful and detailed answers to user after fully understanding "
    "an image."
)

# Images come first whatever turn they belong to; the markers of their objects stand in front of
# the first question. Words that an image stood between are still two words.
_HEAD = """\
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
  {%- if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}
      {%- set images.count = images.count + 1 -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- macro words(message) -%}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- else -%}
    {%- set before = namespace(text='', image=false) -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}{%- set before.image = true -%}
      {%- elif part['type'] == 'text' -%}
        {{- ' ' if before.image and before.text[-1:] | trim and part['text'][:1] | trim else '' -}}
        {{- part['text'] -}}{%- set before.text = part['text'] -%}{%- set before.image = false -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set objects = namespace(count=images.count) -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {{- words(messages[0]) -}}{{- SYSTEM_STOP -}}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {{- SYSTEM_WORDS -}}
{%- endif -%}
{%- for _ in range(images.count) -%}{{- IMAGE_PLACE -}}{%- endfor -%}
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {{- USER_START -}}
    {%- for _ in range(objects.count) -%}{{- 'OBJECTS_MARKER' -}}{%- endfor -%}
    {%- set objects.count = 0 -%}
    {{- words(message) -}}{{- USER_STOP -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ANSWER_START -}}
    {%- generation -%}{{- ANSWER_SPACE -}}{{- words(message) -}}{{- ANSWER_STOP -}}
    {%- endgeneration -%}{{- ANSWER_END -}}
  {%- else -%}
    {{- raise_exception('role: expected system (first), user or assistant') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWER_START -}}{%- endif -%}
"""


def _template(**pieces: str) -> str:
    text = _HEAD.replace("OBJECTS_MARKER", OBJECTS_MARKER)
    for name, expression in (_RELEASED | pieces).items():
        text = text.replace(name, expression)
    return text


# What the released scripts begin with.
_RELEASED = {"SYSTEM_WORDS": f"'{SYSTEM}'", "SYSTEM_STOP": "''", "IMAGE_PLACE": f"' {IMAGE_TOKEN}'"}

CHAT_TEMPLATES: dict[str, str] = {
    "demo": _template(
        USER_START="' USER: '",
        USER_STOP="''",
        ANSWER_START="' ASSISTANT:'",
        ANSWER_SPACE="' '",
        ANSWER_STOP="eos_token",
        ANSWER_END="''",
    ),
    "eval": _template(
        USER_START="' [UNUSED_TOKEN_146]user\\n'",
        USER_STOP="'[UNUSED_TOKEN_145]\\n'",
        ANSWER_START="'[UNUSED_TOKEN_146]assistant\\n'",
        ANSWER_SPACE="''",
        ANSWER_STOP="'[UNUSED_TOKEN_145]'",
        ANSWER_END="'\\n'",
    ),
    "paper": _template(
        SYSTEM_WORDS="''",
        SYSTEM_STOP="' '",
        IMAGE_PLACE=f"'{IMAGE_TOKEN} '",
        USER_START="'User: '",
        USER_STOP="''",
        ANSWER_START="' Assistant:'",
        ANSWER_SPACE="' '",
        ANSWER_STOP="eos_token",
        ANSWER_END="''",
    ),
}
"""Templates by name: two released scripts', the paper's, and LLaVA's eleven."""

LLAVA_MARK = "LLaVA's"
WORDS_LEFT_OUT = "the user's words are left out"
_STOPS_AT = "answers stop at "

# An image stands where its part does, and the parts of a turn are lines.
_LLAVA = """\
{#- COMMENT -#}
{%- set stop = eos_token if eos_token is defined and eos_token else '</s>' -%}
{%- set begin = bos_token if bos_token is defined and bos_token else '' -%}
{%- macro lines(message) -%}
  {%- for part in message['content'] -%}
    {%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
    {%- if part['type'] == 'image' -%}{{- IMAGE_PLACE -}}
    {%- else -%}{{- part['text'] -}}
    {%- endif -%}
  {%- endfor -%}
{%- endmacro -%}
{%- macro places(message) -%}
  {%- if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- IMAGE_PLACE -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set system = SYSTEM_WORDS -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set message = messages[0] -%}
  {%- set system = SAID -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
CHECK{%- set head = namespace(text=SYSTEM_START + system + SYSTEM_STOP if system else '') -%}
{{- OPENING -}}
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {{- USER_START + USER_WORDS + USER_STOP -}}{%- set head.text = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- ANSWER_START -}}
    {%- generation -%}{{- ANSWER_SPACE + SAID + ANSWER_STOP -}}{%- endgeneration -%}
    {{- ANSWER_END -}}
  {%- else -%}
    {{- raise_exception('role: expected system (first), user or assistant') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWER_START -}}{%- endif -%}
"""
_SAID = "(message['content'] if message['content'] is string else lines(message))"
# One caption of one picture, and nothing that anybody asks.
_CAPTION = """\
{%- if turns | map(attribute='role') | join(' ') not in ['user', 'user assistant']
       or not places(turns[0]) -%}
  {{- raise_exception("plain: expected one user's turn with an image and one answer") -}}
{%- endif -%}
"""
_PLAIN = {
    "COMMENT": f"{LLAVA_MARK}: {WORDS_LEFT_OUT}; {_STOPS_AT}'\\n'",
    "CHECK": _CAPTION,
    "SYSTEM_START": "''",
    "SYSTEM_STOP": "''",
    "OPENING": "''",
    "USER_START": "''",
    "USER_WORDS": "places(message)",
    "USER_STOP": "''",
    "ANSWER_START": "''",
    "ANSWER_SPACE": "''",
    "ANSWER_STOP": "'\\n'",
    "ANSWER_END": "''",
    "IMAGE_PLACE": f"'{IMAGE_TOKEN}'",
}
_TURNS = _PLAIN | {
    "COMMENT": LLAVA_MARK,
    "CHECK": "",
    "OPENING": "head.text",
    "USER_WORDS": "SAID",
}
_VICUNA = _TURNS | {
    "SYSTEM_STOP": "' '",
    "USER_START": "'USER: '",
    "USER_STOP": "' '",
    "ANSWER_START": "'ASSISTANT:'",
    "ANSWER_SPACE": "' '",
    "ANSWER_STOP": "stop",
}
_HUMAN = _TURNS | {
    "COMMENT": f"{LLAVA_MARK}: {_STOPS_AT}'\\n###'",
    "SYSTEM_STOP": "'\\n\\n'",
    "OPENING": "head.text + '### '",
    "USER_START": "'Human: '",
    "USER_STOP": "'\\n### '",
    "ANSWER_START": "'Assistant:'",
    "ANSWER_SPACE": "' '",
    "ANSWER_STOP": "'\\n###'",
    "ANSWER_END": "' '",
}
_MISTRAL = _TURNS | {
    "SYSTEM_START": "'<<SYS>>\\n'",
    "SYSTEM_STOP": "'\\n<</SYS>>\\n\\n'",
    "OPENING": "''",
    "USER_START": "'[INST] ' + head.text",
    "USER_STOP": "' [/INST]'",
    "ANSWER_SPACE": "' '",
    "ANSWER_STOP": "' ' + stop",
}
_LLAMA = _MISTRAL | {"USER_START": "('' if loop.first else begin) + '[INST] ' + head.text"}
_CHATML = _TURNS | {
    "COMMENT": f"{LLAVA_MARK}: {_STOPS_AT}'<|im_end|>'",
    "SYSTEM_START": "'<|im_start|>system\\n'",
    "SYSTEM_STOP": "'<|im_end|>'",
    "USER_START": "'<|im_start|>user\\n'",
    "USER_STOP": "'<|im_end|>'",
    "ANSWER_START": "'<|im_start|>assistant\\n'",
    "ANSWER_STOP": "'<|im_end|>'",
}
_TAGGED = {"IMAGE_PLACE": f"'<Image>{IMAGE_TOKEN}</Image>'"}

# Systems; a checkpoint expects them to the letter.
_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
_SEEING = (
    "able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
)
_SEEING_TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is "
    f"{_SEEING}The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
_CONVERSATION = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
_FAMILIES: dict[str, tuple[dict[str, str], str]] = {
    "plain": (_PLAIN, ""),
    "v0": (_HUMAN, _CURIOUS.format("human")),
    "v0_mmtag": (_HUMAN | _TAGGED, _SEEING_TAGS),
    "v1": (_VICUNA, _CURIOUS.format("user")),
    "llava_v1": (_VICUNA, _CURIOUS.format("human")),
    "v1_mmtag": (_VICUNA | _TAGGED, _SEEING_TAGS),
    "llama_2": (_LLAMA, _SAFE),
    "llava_llama_2": (
        _LLAMA,
        f"You are a helpful language and vision assistant. You are {_SEEING}",
    ),
    "mistral_instruct": (_MISTRAL, ""),
    "mpt": (_CHATML, _CONVERSATION),
    "chatml_direct": (_CHATML, "Answer the questions."),
}


def _llava(name: str, system: str | None = None) -> str:
    pieces, own = _FAMILIES[name]
    text = _LLAVA
    for place, expression in pieces.items():
        text = text.replace(place, expression)
    # repr escapes as Jinja reads; last, so that no word of the system is taken for a place.
    text = text.replace("SAID", _SAID)
    return text.replace("SYSTEM_WORDS", repr(own if system is None else system))


CHAT_TEMPLATES |= {name: _llava(name) for name in _FAMILIES}

ALIASES: dict[str, str] = {
    "vicuna_v1": "v1",
    "llava_v0": "v0",
    "v0_plain": "plain",
    "mistral_direct": "chatml_direct",
}
"""Other names that LLaVA has for its templates."""


def names_objects(template: str) -> bool:
    """Say whether prompts name the objects of images where nobody says otherwise.

    Args:
        template: Any; LLaVA's do not.
    """
    return "{#- " + LLAVA_MARK not in template


def stop_string(template: str) -> str | None:
    """Return what an answer stops at where that is not the stop token, which generation is to know.

    Args:
        template: Any; LLaVA's ``plain``, ``v0``, ``v0_mmtag``, ``mpt`` and ``chatml_direct`` have
            one.
    """
    found = re.search(rf"{{#- {LLAVA_MARK}:.*{_STOPS_AT}'(.*?)' -#}}", template)
    return found[1].replace("\\n", "\n") if found else None


def chat_template(name: str, *, system: str | None = None) -> str:
    r"""Return a chat template by its name.

    Args:
        name: Of ``CHAT_TEMPLATES`` or ``ALIASES``.
        system: What a template of LLaVA's says first, unless the conversation has a system message
            of its own; ``""`` says nothing, None what LLaVA says.

    Raises:
        ValueError: naming the templates there are, if there is none of this name; or if this one
            has no system text that could be another.

    Example:
        >>> from collavo.processing.rendering import FilledTemplate
        >>> asked = [{"type": "image"}, {"type": "text", "text": "Who?"}]
        >>> filled = FilledTemplate(chat_template("vicuna_v1", system="Be brief."), {})
        >>> filled.text([{"role": "user", "content": asked}], "a", add_generation_prompt=True)
        'Be brief. USER: <image>\nWho? ASSISTANT:'

    Source: LLaVA's conversation templates.
    """
    own = ALIASES.get(name, name)
    if own not in CHAT_TEMPLATES:
        raise ValueError(
            f"chat template: expected one of {', '.join([*CHAT_TEMPLATES, *ALIASES])}, got {name!r}"
        )
    if system is None:
        return CHAT_TEMPLATES[own]
    if own == "plain" or own not in _FAMILIES:
        raise ValueError(
            f"system: expected none for the chat template {name!r}, which has no system text to "
            "replace; a conversation may start with a system message"
            if own != "plain"
            else f"system: expected none for the chat template {name!r}, which has no system text"
        )
    return _llava(own, system)
