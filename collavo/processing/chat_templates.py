"""Chat templates: how a conversation becomes a prompt.

Both are the released code's: ``"demo"`` works with any tokenizer, ``"eval"`` uses the turn tokens
of InternLM2. What the model has to say, its stop token included, stands in a ``generation`` block,
which is where training takes its loss from. ``<objects>`` is where the processor puts the image's
object text.
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
  {{- words(messages[0]) -}}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {{- 'SYSTEM_TEXT' -}}
{%- endif -%}
{%- for _ in range(images.count) -%}{{- ' IMAGE_TOKEN' -}}{%- endfor -%}
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
    text = _HEAD.replace("SYSTEM_TEXT", SYSTEM)
    text = text.replace("IMAGE_TOKEN", IMAGE_TOKEN).replace("OBJECTS_MARKER", OBJECTS_MARKER)
    for name, expression in pieces.items():
        text = text.replace(name, expression)
    return text


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
}
"""Templates by the released script they come from."""
