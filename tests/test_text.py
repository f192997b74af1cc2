"""Tokeniser, chat templates, detokenisation and stop strings, on tokenisers built here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from seesaw.core.errors import ModelError, RequestError
from seesaw.core.sampling import SamplingParams
from seesaw.text import IncrementalDetokenizer, StopChecker, TextState, Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Die Rüben sind süß; der Käse nicht. Ça va? Où est l'été?",
    "You are a helpful assistant. Answer in one word: yes or no.\n\n### User:\n",
    "def f(x):\n    return x + 1  # twice  spaced\n",
    "日本語のテキストと、中文文本。 Привет, мир! 👩‍💻🙂🙂",
    "Don't stop. Stop! STOP </s> [END] END_OF_TURN",
] * 3

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content.strip() }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS = ["<unk>", "<bos>", "<eos>"]


def _byte_level() -> Rust:
    tokenizer = Rust(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _wordpiece() -> Rust:
    tokenizer = Rust(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _metaspace() -> Rust:
    tokenizer = Rust(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _byte_fallback() -> Rust:
    """As Llama 2 has it: characters outside the vocabulary become byte tokens, a newline among them."""
    trained = Rust(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=260, limit_alphabet=60, special_tokens=SPECIALS, show_progress=False
    )
    trained.train_from_iterator([line.replace("\n", " ") for line in LINES], trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(model["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Rust(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BUILDERS: dict[str, Callable[[], Rust]] = {
    "byte-level": _byte_level,
    "wordpiece": _wordpiece,
    "metaspace": _metaspace,
    "byte-fallback": _byte_fallback,
}
_BUILT: dict[str, Tokenizer] = {}


def save(path: Path, kind: str, *, chat: str | None = CHAT) -> None:
    rust = BUILDERS[kind]()
    rust.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    pairs = [("<bos>", rust.token_to_id("<bos>"))]
    rust.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=pairs
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=rust, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", chat_template=chat
    )
    fast.save_pretrained(path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenisers")
    for kind in BUILDERS:
        save(root / kind, kind)
        _BUILT[kind] = Tokenizer.load(root / kind)
    return {kind: root / kind for kind in BUILDERS}


@pytest.fixture(params=list(BUILDERS), scope="session")
def kind(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    return str(request.param)


def text_of(ids: list[int], kind: str, **sampling: Any) -> tuple[str, str | None, int]:
    """Final text, the stop string met, and the tokens taken."""
    state = TextState(_BUILT[kind], SamplingParams(max_tokens=10_000, **sampling))
    for count, token in enumerate(ids, start=1):
        stop = state.push(token)
        if stop is not None:
            return state.finish(), stop, count
    return state.finish(), None, len(ids)


def tokens_of(text: str, kind: str) -> list[int]:
    return _BUILT[kind].encode(text)[1:]


# --- encoding and chat -------------------------------------------------------------------------------------


def test_encode_is_what_transformers_gives(kind: str, folders: dict[str, Path]) -> None:
    reference = AutoTokenizer.from_pretrained(folders[kind])
    tokenizer = Tokenizer.load(str(folders[kind]))
    for text in [*LINES[:6], "", " lead", "a<eos>b"]:
        assert tokenizer.encode(text) == reference(text)["input_ids"]
    bos = reference.convert_tokens_to_ids("<bos>")
    assert tokenizer.encode("dog")[0] == bos
    assert tokenizer.eos_token_ids == (reference.convert_tokens_to_ids("<eos>"),)
    assert tokenizer.vocab_size == len(reference)


@pytest.mark.parametrize("split", [False, True])
def test_a_tokeniser_that_cuts_and_pads_does_neither_to_prompts(
    split: bool, kind: str, folders: dict[str, Path]
) -> None:
    reference = AutoTokenizer.from_pretrained(folders[kind], split_special_tokens=split)
    given = AutoTokenizer.from_pretrained(folders[kind], split_special_tokens=split)
    given.backend_tokenizer.enable_truncation(4)
    given.backend_tokenizer.enable_padding(length=64)
    tokenizer = Tokenizer(given)
    texts = [*LINES[:6], "", "a<eos>b"]
    wanted = [reference(text)["input_ids"] for text in texts]
    assert [tokenizer.encode(text) for text in texts] == wanted
    assert tokenizer.encode_many(texts) == wanted
    assert tokenizer.encode_many([]) == []


def test_a_tokeniser_with_an_encoding_of_its_own_is_asked(folders: dict[str, Path]) -> None:
    class Louder(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            louder = text.upper() if isinstance(text, str) else [each.upper() for each in text]
            return super()._encode_plus(louder, *args, **kwargs)

        _batch_encode_plus = _encode_plus

    plain = _BUILT["byte-level"]
    tokenizer = Tokenizer(Louder.from_pretrained(folders["byte-level"]))
    assert tokenizer.encode("loud") == plain.encode("LOUD") != plain.encode("loud")
    assert tokenizer.encode_many(["loud", "louder"]) == plain.encode_many(["LOUD", "LOUDER"])


def test_chat_applies_the_template_once_with_one_bos(kind: str, folders: dict[str, Path]) -> None:
    reference = AutoTokenizer.from_pretrained(folders[kind])
    tokenizer = _BUILT[kind]
    messages = [{"role": "system", "content": "Answer  in one word."}, {"role": "user", "content": "süß? 🙂"}]
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    )
    for options in choices:
        wanted: dict[str, Any] = {"add_generation_prompt": not options, **options}
        text = reference.apply_chat_template(messages, tokenize=False, **wanted)
        ids = tokenizer.render_chat(messages, **options)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.apply_chat_template(messages, return_dict=False, **wanted)
        assert ids.count(reference.bos_token_id) == 1 and ids[0] == reference.bos_token_id
    assert all(type(token) is int for token in tokenizer.render_chat(messages))


def test_chat_accepts_text_parts_and_tuples(folders: dict[str, Path]) -> None:
    tokenizer = _BUILT["byte-level"]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = tokenizer.render_chat([{"role": "user", "content": "one\ntwo"}])
    messages = ({"role": "user", "content": parts},)
    assert tokenizer.render_chat(messages) == joined
    assert messages == ({"role": "user", "content": parts},)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "expected a list"),
        ({"role": "user", "content": "x"}, "expected a list"),
        ([], "empty"),
        (["hello"], "message 0 is str"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "message 1: role=None"),
        ([{"role": 3, "content": "x"}], "role=3"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": 5}], "content is int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": "a\ud800"}], "U+D800"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
        ([{"role": "user", "content": None, "tool_calls": [{}]}], "chat template failed"),
    ],
)
def test_malformed_messages_are_request_errors(messages: Any, said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError) as caught:
        _BUILT["byte-level"].render_chat(messages)
    assert said in str(caught.value)
    assert (caught.value.code, caught.value.param) == ("invalid_messages", "messages")


def test_without_a_template_chat_is_a_request_error(tmp_path: Path) -> None:
    save(tmp_path, "wordpiece", chat=None)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert caught.value.code == "no_chat_template"


def test_prompts_that_are_not_text_are_request_errors(kind: str) -> None:
    for prompt, said in ((7, "found int"), ("ok \udfff", "character 3")):
        with pytest.raises(RequestError, match=said) as caught:
            _BUILT[kind].encode(prompt)  # type: ignore[arg-type]
        assert caught.value.code == "invalid_prompt"


def test_missing_or_broken_tokenisers_are_model_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    for path in (tmp_path / "nowhere", tmp_path, broken, "nobody/has-this-model"):
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value)


def test_importing_the_module_is_light() -> None:
    program = "import sys, seesaw.text; assert not {'transformers', 'torch', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# --- detokenisation ----------------------------------------------------------------------------------------


def pieces_of(ids: list[int], kind: str, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(_BUILT[kind], skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_the_decoded_text(kind: str, data: st.DataObject) -> None:
    tokenizer = _BUILT[kind]
    skip = data.draw(st.booleans())
    text = data.draw(st.one_of(st.text(max_size=40), st.text("ab 🙂é日.' \n", max_size=40)))
    ids = tokens_of(text, kind)
    if kind != "byte-fallback":  # there, arbitrary bytes after a character change what it decodes to
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60)) + ids
    assert "".join(pieces_of(ids, kind, skip)) == tokenizer.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_final_text_is_decode_whatever_the_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer = _BUILT[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    for skip in (True, False):
        stop = ("\u1234 never \u1234",)
        assert text_of(ids, kind, stop=stop, skip_special_tokens=skip)[0] == tokenizer.decode(ids, skip)


def test_decode_returns_what_was_encoded_and_cleans_nothing(kind: str) -> None:
    text = "the dog does not mind , and the fox ? do n't !"
    if kind != "wordpiece":
        assert _BUILT[kind].decode(tokens_of(text, kind)) == text
    assert _BUILT[kind].decode(_BUILT[kind].encode("dog")) == "dog"
    assert "<bos>" in _BUILT[kind].decode(_BUILT[kind].encode("dog"), skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_characters_over_several_tokens_come_whole_and_at_once(kind: str, folders: dict[str, Path]) -> None:
    text = "a𝔊b"
    ids = tokens_of(text, kind)
    pieces = pieces_of(ids, kind, True)
    assert [piece for piece in pieces if piece] == ["a", "𝔊", "b"]
    assert pieces[-2] == "b" and len(ids) == 6 + (kind == "byte-fallback" and tokens_of("a", kind) != ids[:1])


@pytest.mark.parametrize("stray", [3, 40])
def test_stray_bytes_are_released_and_hide_no_character(stray: int, folders: dict[str, Path]) -> None:
    character = tokens_of("𝔊", "byte-level")
    ids = character[-1:] * stray + character
    pieces = pieces_of(ids, "byte-level", True)
    assert "".join(pieces) == "\ufffd" * stray + "𝔊" == _BUILT["byte-level"].decode(ids)
    assert len("".join(pieces[:stray])) == (stray - 3 if stray > 8 else 0)


def test_unfinished_characters_appear_in_the_final_text(folders: dict[str, Path]) -> None:
    ids = tokens_of("a𝔊", "byte-level")[:-1]
    assert text_of(ids, "byte-level", stop=("x",)) == ("a\ufffd", None, len(ids))


# --- stop strings ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_at_their_first_completion(kind: str, data: st.DataObject) -> None:
    """Against a search in the whole text, prefix by prefix."""
    words = st.lists(st.sampled_from(["dog", "fox", "END", "\n\n", "🙂", "é", " ", "STOP", "."]), max_size=15)
    ids = tokens_of("".join(data.draw(words)), kind)
    full = _BUILT[kind].decode(ids)
    stops = st.one_of(
        st.sampled_from(["dog", "og", "D", "OP", "\n\n", "g f", "xo", "🙂", "é ", "DE", "P.", "nothing"]),
        st.text(full or "a", min_size=1, max_size=4),
    )
    stop = tuple(data.draw(st.lists(stops, min_size=1, max_size=3)))
    include = data.draw(st.booleans())
    text, met, taken = text_of(ids, kind, stop=stop, include_stop_str_in_output=include)
    ends = [end for end in range(len(full) + 1) if any(full[:end].endswith(s) for s in stop)]
    if not ends:
        assert (text, met, taken) == (full, None, len(ids))
        return
    wanted = max((s for s in stop if full[: ends[0]].endswith(s)), key=len)
    assert met == wanted
    assert text == full[: ends[0] if include else ends[0] - len(wanted)]
    # Noticed at once: the text of one token fewer does not hold it.
    assert wanted not in _BUILT[kind].decode(ids[: taken - 1])


@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_checker_does_not_depend_on_the_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    def run(pieces: list[str]) -> tuple[str | None, str]:
        checker = StopChecker(stop)
        for piece in pieces:
            met = checker.feed(piece)
            if met is not None:
                return met, checker.text
        return None, checker.text

    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert run(pieces) == run(list(text)) == run([text])


@settings(max_examples=60, deadline=None)
@given(least=st.integers(0, 12))
def test_stop_strings_before_min_tokens_do_not_count(kind: str, least: int) -> None:
    ids = tokens_of("dog fox dog fox dog", kind)
    assume(least <= len(ids))
    full = _BUILT[kind].decode(ids)
    text, met, taken = text_of(ids, kind, stop=("fox", "and a longer one"), min_tokens=least)
    hidden = len(_BUILT[kind].decode(ids[:least]))  # a match must end behind this
    start = full.find("fox", max(0, hidden - 2))
    assert (text, met) == ((full, None) if start < 0 else (full[:start], "fox"))
    assert met is None or taken > least


def test_stop_string_over_a_special_token_that_is_shown(folders: dict[str, Path]) -> None:
    tokenizer = _BUILT["byte-level"]
    ids = tokens_of("dog<eos>fox", "byte-level")
    assert tokenizer.eos_token_ids[0] in ids
    assert text_of(ids, "byte-level", stop=("gf",))[:2] == ("do", "gf")
    assert text_of(ids, "byte-level", stop=("<eos>f",), skip_special_tokens=False)[:2] == ("dog", "<eos>f")
