"""Turn texts into arrays: padded batches, pairs and chats, on top of the package tokenizers."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from nyscaled.checkpoints import files, swap
from nyscaled.models.tokenizers import chat, soundness
from nyscaled.models.tokenizers.special_tokens import (
    ADDED,
    ADDITIONAL,
    DECODER,
    EXTRA,
    SETTINGS,
    SPECIAL,
    roles,
    with_sides,
)

FILE = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
_OVERRIDING = SPECIAL, TEMPLATE, ADDED, f"{TEMPLATES}/"
_DEFAULT = "default"


class Tokenizer:
    """A `tokenizers.Tokenizer` that returns padded arrays, and knows its chat template.

    It has the library's other methods too: `tokenizer.encode(text).ids`, `tokenizer.decode(ids)`,
    `tokenizer.token_to_id(token)`, … Truncation and padding by `tokenizer.json` are switched off;
    both are arguments here.

    Args:
        inner: tokenizer of the package tokenizers.
        settings: what `tokenizer_config.json` holds. `pad_token`, `eos_token`, `padding_side`,
            `truncation_side` and `chat_template` are used. A pad token and sides that it lacks are
            those of `tokenizer.json`.

    Attributes:
        pad_id: id of `pad_token`, else of `eos_token`, else None.

    Raises:
        ValueError: on a `chat_template` that is neither a text nor several with names, a
            side that is neither "left" nor "right", or a tokenizer that fails on some
            texts. What the library raises later is a ValueError too.

    Examples:
        >>> import tokenizers
        >>> vocabulary = {"<pad>": 0, "low": 1, "rank": 2}
        >>> inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="low"))
        >>> inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer(inner, {"pad_token": "<pad>"})
        >>> tokens, mask = tokenizer(["low rank", "rank"])
        >>> tokens
        array([[1, 2],
               [0, 2]], dtype=int32)
        >>> mask
        array([[ True,  True],
               [False,  True]])
        >>> tokenizer.encode("rank low").ids
        [2, 1]
    """

    def __init__(self, inner: Any, settings: Mapping[str, Any] | None = None) -> None:
        if not callable(getattr(inner, "encode_batch", None)):
            raise ValueError(
                f"inner is {inner!r:.80}; expected a tokenizer of the package tokenizers"
            )
        named = isinstance(settings, Mapping) and all(isinstance(name, str) for name in settings)
        if settings is not None and not named:
            raise ValueError(f"settings is {settings!r:.80}; expected values by their names")
        self.inner = inner
        self.settings = with_sides(inner, settings or {})
        inner.no_padding()
        inner.no_truncation()
        for name in ("padding_side", "truncation_side"):
            _require_side(name, getattr(self, name))
        special = roles(self.settings)
        names = [special.get(name) for name in ("pad_token", "eos_token")]
        ids = [inner.token_to_id(name) for name in names if name is not None]
        self.pad_id: int | None = next((i for i in ids if i is not None), None)
        named_templates(self.settings)  # refuses what is none
        soundness.require_usable(inner)

    @property
    def padding_side(self) -> str:
        """The side of padding in calls without `side`: that of the settings, else "left".

        `nyscaled.models.load` makes it "right" for an encoder whose settings have none.
        """
        return self.settings.get("padding_side") or "left"

    @property
    def truncation_side(self) -> str:
        """The side on which long texts are cut: that of the settings, else "right"."""
        return self.settings.get("truncation_side") or "right"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        value = getattr(self.inner, name)
        return _refusing(name, value) if callable(value) else value

    def __call__(
        self,
        texts: Sequence[str],
        *,
        side: Literal["left", "right"] | None = None,
        max_length: int | None = None,
        multiple_of: int = 1,
        add_special_tokens: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of texts, (batch, length) int32, and their mask, (batch, length) bool.

        Args:
            texts: a text per row.
            side: side of the padding; `padding_side` if None.
            max_length: most tokens per row. Longer texts lose their end, or their beginning if
                `truncation_side` is "left"; special tokens stay.
            multiple_of: the length is rounded up to a multiple of this number, so that programs
                are compiled for few shapes. With the value of `max_length` there is one shape.
            add_special_tokens: whether to add the tokens at beginning and end. Pass False for
                what `chat` returned, which has them already.

        Raises:
            ValueError: on anything but texts, a length that is not a positive integer or has no
                room for the special tokens, or texts of different lengths without a token to pad
                with.
        """
        _require_texts("texts", texts)
        rows, _ = self._encoded(list(texts), max_length, add_special_tokens)
        return self._padded(rows, self.padding_side if side is None else side, multiple_of)

    def pairs(
        self,
        first: Sequence[str],
        second: Sequence[str],
        *,
        max_length: int | None = None,
        multiple_of: int = 1,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, mask and types of pairs of texts, (batch, length), padded on the right.

        Types, int32, say which of the two texts a token belongs to, as BERT requires. Where a pair
        is too long, the longer of the two is cut first.

        Args:
            first: first text of each pair.
            second: second text of each pair.
            max_length: most tokens per pair, as in a call.
            multiple_of: as in a call.

        Raises:
            ValueError: as a call does, and on lists of different lengths.
        """
        _require_texts("first", first)
        _require_texts("second", second)
        if len(first) != len(second):
            raise ValueError(f"there are {len(first)} first and {len(second)} second texts")
        both = list(zip(first, second, strict=True))
        rows, rows_of_types = self._encoded(both, max_length, True)
        tokens, mask = self._padded(rows, "right", multiple_of)
        types = np.zeros_like(tokens)
        for row, values in zip(types, rows_of_types, strict=True):
            row[: len(values)] = values
        return tokens, mask, types

    def chat(
        self,
        messages: Sequence[object],
        *,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation, by the chat template, as transformers renders it.

        A template is a program of unknown origin: it is rendered in a separate process, which is
        ended if it takes 5 seconds or a gigabyte (`nyscaled.models.tokenizers.templates`).

        Args:
            messages: messages with "role" and "content".
            tools: tools that the model may call: JSON schemas, or functions with type hints and a
                docstring that describes each argument under `Args:`.
            documents: sources for the answer, with "title" and "text".
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            continue_final_message: whether the text ends within the last message, so that the
                model continues it. A string names the field to continue instead of "content".
            template: name of the template, where there are several. None for "tool_use" if there
                are tools and a template of this name, and for "default" otherwise.
            **variables: other variables of the template, such as `enable_thinking`.

        Raises:
            ValueError: without a template of this name, if the template refuses the messages or
                goes beyond a limit, on messages, tools and documents of another form, on arguments
                of transformers' `apply_chat_template` that are not the template's, or if the
                template does not repeat the message to continue.
            ImportError: without the package jinja2.

        Examples:
            >>> import tokenizers
            >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
            >>> inner = tokenizers.Tokenizer(tokenizers.models.BPE())
            >>> tokenizer = Tokenizer(inner, {"chat_template": template})
            >>> tokenizer.chat([{"role": "user", "content": "Hello"}])
            'user: Hello\\n'
        """
        templates = named_templates(self.settings)
        if template is None:
            named = tools is not None and "tool_use" in templates
            template = "tool_use" if named else _DEFAULT
        if not isinstance(template, str) or template not in templates:
            known = files.brief(", ".join(templates)) or "no chat template"
            raise ValueError(
                f"there is no chat template {template!r:.80}; the tokenizer has {known}"
            )
        return chat.render(
            templates[template],
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**roles(self.settings), **variables},
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads.

        Older files of a tokenizer that would override them are removed: their content is in these.
        `nyscaled.models.save` writes them together with a model. They are replaced together: after
        a process was killed, the folder has the old tokenizer or the new one.

        Args:
            folder: folder to write, made if missing.

        Raises:
            ValueError: if a directory is in the place of a file.
            OSError: if a file cannot be written or moved.
        """
        with swap.replacing(folder, self.files(), last=FILE):
            pass

    def files(self) -> dict[str, str | None]:
        """Return the texts that `save` writes by names of files, None to remove a file."""
        # The class of transformers that belongs to no model reads all from tokenizer.json.
        defaults = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        # All tokens are in tokenizer.json, and their list here would have to be whole.
        lists = DECODER, ADDED
        settings = {name: value for name, value in self.settings.items() if name not in lists}
        if isinstance(settings.get(EXTRA), list):  # its name in transformers 4
            settings[ADDITIONAL] = settings.pop(EXTRA)
        return {
            FILE: self.to_str(pretty=True),
            SETTINGS: files.as_json(defaults | settings),
            **dict.fromkeys(_OVERRIDING),
        }

    def _encoded(
        self, texts: list[Any], max_length: int | None, special: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return tokens and types of each text or pair."""
        if max_length is not None:
            _require_positive("max_length", max_length)
        tokens, types = [], []
        # The library cuts by a setting that all users of the tokenizer share, so it is done here.
        for encoding in self.encode_batch(texts, add_special_tokens=special):
            kept = _kept(encoding, max_length, self.truncation_side)
            for rows, row in ((tokens, encoding.ids), (types, encoding.type_ids)):
                rows.append(row if kept is None else [row[i] for i in kept])
        return tokens, types

    def _padded(
        self, rows: list[list[int]], side: str, multiple_of: int
    ) -> tuple[np.ndarray, np.ndarray]:
        _require_side("side", side)
        _require_positive("multiple_of", multiple_of)
        lengths = [len(row) for row in rows]
        width = -(-max(*lengths, 1) // multiple_of) * multiple_of
        if self.pad_id is None and min(lengths) < width:
            raise ValueError("padding needs a pad_token or an eos_token; the tokenizer has neither")
        tokens = np.full((len(rows), width), self.pad_id or 0, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, row in enumerate(rows):
            columns = slice(width - len(row), width) if side == "left" else slice(len(row))
            tokens[i, columns], mask[i, columns] = row, True
        return tokens, mask


def _refusing(name: str, method: Any) -> Any:
    """Return a method of the library with errors that are ValueErrors."""

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        with soundness.refusing(f"the tokenizer's {name} fails"):
            return method(*args, **options)

    return call


def named_templates(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of `tokenizer_config.json`, by their names.

    Args:
        settings: what the file holds.

    Raises:
        ValueError: on a `chat_template` that is neither a text nor several with names.
    """
    value = settings.get("chat_template") or {}
    named: dict[Any, Any] = {_DEFAULT: value}
    if isinstance(value, dict):
        named = value
    elif isinstance(value, list):
        with contextlib.suppress(KeyError, TypeError):
            named = {entry["name"]: entry["template"] for entry in value}
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise ValueError(f"chat_template is {value!r:.80}; expected a text, or some with names")
    return named


def _require_texts(name: str, texts: Sequence[str]) -> None:
    several = isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) > 0
    if not several or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {texts!r:.80}; expected a list of texts, one at least")


def _require_side(name: str, side: Any) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"{name} is {side!r}; expected 'left' or 'right'")


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a positive integer")


def _kept(encoding: Any, max_length: int | None, side: str) -> list[int] | None:
    """Return the positions that a text or a pair keeps, None for all.

    Special tokens stay, and the longer text is cut first, as in the library.
    """
    if max_length is None or len(encoding) <= max_length:
        return None
    sequences = encoding.sequence_ids  # 0 and 1, None for special tokens
    special = sequences.count(None)
    room = max_length - special
    if room < 0:
        raise ValueError(f"max_length is {max_length}; the special tokens alone are {special}")
    lengths = [sequences.count(0), sequences.count(1)]
    shorter = min(*lengths, room // 2)
    rooms = [shorter, room - shorter]
    if lengths[0] > lengths[1]:
        rooms.reverse()
    kept = []
    positions = list(enumerate(sequences))
    for i, sequence in positions if side == "right" else reversed(positions):
        if sequence is not None:
            rooms[sequence] -= 1
        if sequence is None or rooms[sequence] >= 0:
            kept.append(i)
    return sorted(kept)
