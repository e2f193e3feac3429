"""Chat templates: how a conversation becomes a prompt.

``"demo"`` and ``"eval"`` are the released code's: the first works with any tokenizer, the second
uses the turn tokens of InternLM2. ``"paper"`` is the protocol that the paper prints: the image,
``User:``, ``Assistant:`` and a stop token, with single blanks between. What the model has to say,
its stop token included, stands in a ``generation`` block, which is where training takes its loss
from. ``<objects>`` is where the processor puts the image's object text.
"""

from __future__ import annotations

IMAGE_TOKEN = "<image>"
OBJECTS_MARKER = "<objects>"
SYSTEM = (
    "AI assistant should give helpful and detailed answers to user after fully understanding "
    "an image."
)

# Images come first whatever turn they belong to; the markers of their objects stand in front of
# the first question.
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
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}
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
"""Templates by where they come from: two released scripts, and the paper."""
