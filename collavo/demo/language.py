"""A word-level tokenizer for the demo's small language, and its chat template.

Words keep their leading blank, and a bounding box is four tokens, one per coordinate, so decoding
gives the text back exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from collavo.demo.scenes import SIZE, SNAP

PAD, STOP, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"

# The commas of "[0.06, 0.38, 0.27, 0.91]" are shared out so that x1, y1, x2 and y2 are four
# different tokens each: " [0.06", ", 0.38,", " 0.27" and ", 0.91]".
_PATTERN = (
    r" ?\[\d\.\d\d|, \d\.\d\d[\],]| \d\.\d\d|,? ?\(#\d+|,? #\d+| ?[A-Za-z]+:?|\)|[^\sA-Za-z\d]| "
)
_COORDINATE = re.compile(r"( \[)?(, )?( )?(\d\.\d\d)([\],])?")

CHAT_TEMPLATE = """\
{%- set images = namespace(count=0) -%}
{%- for message in messages if message['content'] is not string -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}
    {%- set images.count = images.count + 1 -%}
  {%- endfor -%}
{%- endfor -%}
{%- for _ in range(images.count) -%}{{- '<image>' -}}{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is not string -%}
    {%- set content = content | selectattr('type', 'eq', 'text') | map(attribute='text') | join -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- ' User: ' -}}{%- if loop.first -%}
      {%- for _ in range(images.count) -%}{{- '<objects>' -}}{%- endfor -%}
    {%- endif -%}{{- content -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' Assistant:' -}}{%- generation -%}{{- ' ' + content + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' Assistant:' -}}{%- endif -%}
"""


def coordinate_of(token: str) -> tuple[int, float] | None:
    """Return which coordinate a token is (0 to 3 for x1, y1, x2, y2) and its value, if it is one.

    Args:
        token: A token of the vocabulary.

    Example:
        >>> coordinate_of(" [0.06"), coordinate_of(", 0.38,"), coordinate_of(" horse")
        ((0, 0.06), (1, 0.38), None)
    """
    match = _COORDINATE.fullmatch(token)
    if match is None:
        return None
    bracket, _, _, value, end = match.groups()
    kind = 0 if bracket else {",": 1, None: 2, "]": 3}[end]
    return kind, float(value)


def split_words(text: str) -> list[str]:
    """Split a text as the tokenizer does.

    Args:
        text: Without special tokens.

    Example:
        >>> split_words(" dog [0.06, 0.38, 0.27, 0.91]?")
        [' dog', ' [0.06', ', 0.38,', ' 0.27', ', 0.91]', '?']
    """
    return [match.group(0) for match in re.finditer(_PATTERN, text)]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows the words of some texts and every coordinate of the scenes.

    Args:
        texts: What the model is to read and to say.
    """
    words = {word for text in texts for word in split_words(text)}
    for step in range(SIZE // SNAP + 1):
        value = f"{step * SNAP / SIZE:.2f}"
        words |= {f" [{value}", f", {value},", f" {value}", f", {value}]"}
    specials = [PAD, STOP, UNKNOWN, IMAGE]
    vocabulary = {word: index for index, word in enumerate(specials + sorted(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.decoder = Fuse()
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        unk_token=UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([IMAGE], special_tokens=True)
    return fast
