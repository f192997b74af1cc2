"""Text to token ids and back: prompts, chat templates, completions, stop strings.

transformers is imported when a tokeniser is loaded, not before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from seesaw.core.errors import ModelError, RequestError
from seesaw.core.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What a decoder prints for bytes that are not, or not yet, a character."""
_MAX_PENDING = 8
"""After this many unfinished tokens only the last bytes can still become a character."""
_MAX_UNFINISHED = 3
"""Bytes of a character that still lacks its last one."""


class Tokenizer:
    """A Hugging Face tokeniser, reduced to what the engine needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.name = name
        """What `load` was called with; None of one that was made otherwise."""
        self._decode = _decoding(tokenizer)
        self._encode = _encoding(tokenizer)

    @classmethod
    def load(cls, path_or_name: str | PathLike[str]) -> Tokenizer:
        """Load from a folder, or from the local Hugging Face cache by name; nothing is downloaded.

        Code that comes with a checkpoint is never run. Raises `ModelError`.
        """
        from transformers import AutoTokenizer

        name = str(path_or_name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            return cls(tokenizer, name)
        except Exception as error:  # transformers and tokenizers raise nearly every type there is
            reason = " ".join(str(error).split())
            raise ModelError(
                f"tokeniser of {name!r}: cannot be loaded ({reason}); expected a folder with tokenizer.json "
                "and tokenizer_config.json, or the name of a model in the local Hugging Face cache"
            ) from error

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token of the tokeniser, if it has one. A model's config may name more."""
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    def hugging_face(self) -> PreTrainedTokenizerBase:
        """The tokeniser as transformers knows it: a copy, so that what is set on it changes nothing here."""
        return copy.deepcopy(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included; a model may have more rows than this."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens this tokeniser adds by default (often a BOS).

        Raises `RequestError` with code `invalid_prompt` for what is not encodable text.
        """
        if not isinstance(text, str):
            raise RequestError(
                f"prompt: expected text, found {type(text).__name__}", code="invalid_prompt", param="prompt"
            )
        _check_encodable(text, what="prompt", code="invalid_prompt", param="prompt")
        (ids,) = self._encode([text])
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in less time. Raises as it does, not saying for which text."""
        for text in texts:
            _check_encodable(text, what="prompt", code="invalid_prompt", param="prompt")
        return self._encode(list(texts))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of a conversation under the tokeniser's chat template, ready for the assistant's answer.

        `messages` are mappings with `role` and `content`; content given as a list of text parts is joined by
        newlines. `kwargs` go to `apply_chat_template` (`tools`, `continue_final_message`, variables of the
        template). The template is applied once, and it alone places special tokens.
        Raises `RequestError`: `no_chat_template`, or `invalid_messages` for messages that are malformed or
        that the template refuses.
        """
        return cast("list[int]", self._rendered(messages, {**kwargs, "tokenize": True, "return_dict": False}))

    def render_prompt(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> tuple[str, list[int]]:
        """The text of a conversation under the chat template, and its token ids: those of `render_chat`."""
        text = cast("str", self._rendered(messages, {**kwargs, "tokenize": False}))
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return text, list(cast("list[int]", ids))

    def _rendered(self, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]) -> object:
        if not (self._tokenizer.chat_template or options.get("chat_template")):
            raise RequestError(
                "messages: this model's tokeniser has no chat template; send a prompt instead",
                code="no_chat_template",
                param="messages",
            )
        conversation = [_message(message, i) for i, message in enumerate(_listed(messages))]
        options = {"add_generation_prompt": not options.get("continue_final_message"), **options}
        try:
            return self._tokenizer.apply_chat_template(conversation, **options)
        except Exception as error:  # templates are programs; whatever one raises concerns these messages only
            raise _invalid_messages(f"the chat template failed: {' '.join(str(error).split())}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a completion. Spaces before punctuation stay as the model wrote them."""
        return self._decode(list(ids), skip_special_tokens)


_CALLED = (
    *("__call__", "_call_one", "encode_plus", "_encode_plus", "batch_encode_plus", "_batch_encode_plus"),
    *("_switch_to_input_mode", "set_truncation_and_padding"),
)
"""Methods through which text goes on its way to the Rust tokeniser, in the releases of transformers there are."""


def _encoding(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """The function that makes token ids of texts.

    Where transformers would only hand the texts on to the Rust tokeniser, they go there directly: what it does
    around that takes several times as long for a short text.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if not issubclass(kind, Fast) or any(
        getattr(kind, name, None) is not getattr(Fast, name, None) for name in _CALLED
    ):
        return lambda texts: [list(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    rust = cast("Fast", tokenizer).backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = tokenizer.split_special_tokens

    def encode(texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:  # there is nothing to do side by side
            return [rust.encode(texts[0]).ids]
        return [encoding.ids for encoding in rust.encode_batch_fast(texts)]

    return encode


def _decoding(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int], bool], str]:
    """The function that makes text of token ids, given whether to leave special tokens out.

    Where transformers would only hand the ids on to the Rust tokeniser, they go there directly: looking for tensors
    among them, as it does first, takes several times as long as decoding them.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if issubclass(kind, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        return cast("Fast", tokenizer).backend_tokenizer.decode
    return lambda ids, skip: str(
        tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    )


def _invalid_messages(reason: str) -> RequestError:
    return RequestError(f"messages: {reason}", code="invalid_messages", param="messages")


def _check_encodable(text: str, *, what: str, code: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what}: character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X}), "
            "which is no text; replace it",
            code=code,
            param=param,
        ) from error


def _listed(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, (list, tuple)):
        raise _invalid_messages(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise _invalid_messages("the list is empty; expected at least one message")
    return messages


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A copy of message number `index` whose content is text, if it has content."""
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise _invalid_messages(
            f"{where} is {type(message).__name__}; expected an object with role and content"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise _invalid_messages(f"{where}: role={role!r}; expected text such as 'user'")
    result = {str(key): value for key, value in message.items()}
    if content is None:
        if not message.get("tool_calls"):
            raise _invalid_messages(f"{where} has no content")
        return result
    if isinstance(content, (list, tuple)):
        content = "\n".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise _invalid_messages(
            f"{where}: content is {type(content).__name__}; expected text or a list of text parts"
        )
    _check_encodable(content, what=f"messages: {where}", code="invalid_messages", param="messages")
    return {**result, "content": content}


def _text_part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise _invalid_messages(f"{where}: content part of type {kind!r}; only text parts are supported")


class IncrementalDetokenizer:
    """Text of a sequence while its tokens arrive, released as soon as later tokens cannot change it.

    The text of a token depends on its neighbours (leading spaces, characters spread over several tokens). So
    each token is decoded together with the tokens of the previous release, and what those alone decode to is
    taken off. A tail of unfinished characters is held back. Where a decoder changes its mind about bytes
    already shown (under byte fallback: a whole character, then stray bytes), the pieces differ in those
    characters from `Tokenizer.decode` of all tokens; otherwise they add up to it.
    """

    __slots__ = ("_prefix", "_read", "_sent", "_skip", "_tokenizer", "ids")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self.ids: list[int] = []
        """All tokens so far."""
        self._prefix = 0  # start of the window that is decoded
        self._read = 0  # tokens before this one are released in full
        self._sent = 0  # released characters of the window's text

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that became certain with it, often its own, perhaps none."""
        self.ids.append(token_id)
        window = self._decode(self._prefix, len(self.ids))
        held = len(window) - len(window.rstrip(_UNFINISHED))
        if len(self.ids) - self._read > _MAX_PENDING:
            held = min(held, _MAX_UNFINISHED)
        end = len(window) - held
        if end <= self._sent:
            return ""
        text = window[self._sent : end]
        self._sent = end
        if not held:
            self._prefix, self._read = self._read, len(self.ids)
            self._sent = len(self._decode(self._prefix, self._read))
        return text

    def flush(self) -> str:
        """The unfinished rest, when no more tokens come."""
        text = self._decode(self._prefix, len(self.ids))[self._sent :]
        self._sent += len(text)
        return text

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self.ids[start:end], self._skip)


class StopChecker:
    """Collects text and finds stop strings in it, wherever the pieces were cut.

    The stop string that is complete first wins; of two that end together, the longer. So the outcome does not
    depend on how the text is cut into tokens.
    """

    __slots__ = ("_include", "_pieces", "_reach", "_stop", "_tail")

    def __init__(self, stop: Iterable[str], *, include_stop_str_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._reach = max(map(len, self._stop), default=1) - 1
        self._pieces: list[str] = []
        self._tail = ""  # the last `_reach` characters: a stop string may begin there

    @property
    def text(self) -> str:
        """Text so far; after a match it ends before the stop string, or behind it if that is included."""
        return "".join(self._pieces)

    def feed(self, piece: str, *, check: bool = True) -> str | None:
        """Append `piece`; returns the stop string it completes (if `check`) and cuts `text` there."""
        known = len(self._tail)
        area = self._tail + piece
        found = self._find(area, known) if check and piece else None
        self._pieces.append(piece)
        self._tail = area[max(0, len(area) - self._reach) :]
        if found is None:
            return None
        start, stop = found
        end = start + len(stop) if self._include else start
        text = self.text
        self._pieces = [text[: len(text) - len(area) + end]]
        return stop

    def _find(self, area: str, known: int) -> tuple[int, str] | None:
        """Start and text of the stop string that ends first behind the first `known` characters of `area`."""
        starts = ((area.find(stop, max(0, known - len(stop) + 1)), stop) for stop in self._stop)
        matches = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        return min(matches)[1:] if matches else None


class TextState:
    """The text of one sequence and its stop strings.

    Push every sampled token, but the one that ended the sequence by its id (EOS or a stop token) only if it is shown.
    """

    __slots__ = ("_checker", "_min_tokens", "_pieces", "_skip", "_stopped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip = sampling.skip_special_tokens
        self._min_tokens = sampling.min_tokens
        self._pieces = IncrementalDetokenizer(tokenizer, skip_special_tokens=self._skip)
        self._checker = StopChecker(
            sampling.stop, include_stop_str_in_output=sampling.include_stop_str_in_output
        )
        self._stopped = False

    def push(self, token_id: int) -> str | None:
        """Take the next token; returns the stop string it completes, which ends the sequence, or None.

        Stop strings that are complete within the first `min_tokens` tokens do not count.
        """
        assert not self._stopped, "the sequence has met a stop string"
        piece = self._pieces.push(token_id)
        stop = self._checker.feed(piece, check=len(self._pieces.ids) > self._min_tokens)
        self._stopped = stop is not None
        return stop

    def finish(self) -> str:
        """The final text: cut at the stop string, or else exactly `Tokenizer.decode` of all tokens."""
        return self._checker.text if self._stopped else self._tokenizer.decode(self._pieces.ids, self._skip)
