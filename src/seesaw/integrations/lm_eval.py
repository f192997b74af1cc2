"""The model `seesaw` of EleutherAI's lm-evaluation-harness; importing this module registers it.

    import lm_eval, seesaw.integrations.lm_eval
    lm_eval.simple_evaluate(model="seesaw", model_args="pretrained=PATH,plan=P2->T2", tasks=["hellaswag"])

On the command line, `seesaw eval` is `lm_eval` with this module imported. Prompts, truncation, windows and
texts are those of the harness's own model `hf`, so that results on one checkpoint are the same. What differs:
all requests of a kind go to the engine at once, which batches them itself, and log-probabilities are made in
float32 whatever the type of the weights.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, maybe_truncate, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm
from transformers import AutoTokenizer

from seesaw import LLM, Request, RequestOutput, SamplingParams, __version__
from seesaw.core.devices import device_kind
from seesaw.core.errors import ConfigError
from seesaw.device.gpus import visible_gpus
from seesaw.integrations.generation import Generation
from seesaw.rows import Counted

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation, for the harness's cache, and their tokens."""
DEFAULT_MAX_GEN_TOKS = 256
"""As `hf` has it."""


@register_model("seesaw")
class SeesawLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The harness's view of an `LLM`."""

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        *,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Names are those of the harness's `hf` and mean the same; `options` are those of `LLM` (plan, ranks, device,
        device_memory, host_kv, dtype, …). Sizes of batches are the engine's business: `batch_size` and
        `max_batch_size` change nothing.

        Raises a `ConfigError` for what cannot be used, and what `LLM` raises.
        """
        super().__init__()
        if enable_thinking and think_end_token is None:
            raise ConfigError(
                "enable_thinking: give think_end_token too, behind which answers are looked for"
            )
        logger.info("batch_size=%s has no effect: the engine batches requests itself", batch_size)
        special = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        folder = tokenizer or pretrained
        self._llm = LLM(pretrained, tokenizer=folder, max_model_len=max_length, **options)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, **special)
        if max_length is not None and max_length > self._llm.max_model_len:
            self._llm.close()
            longest = self._llm.max_model_len
            raise ConfigError(
                f"max_length={max_length}: {pretrained} takes sequences of {longest} tokens at most"
            )
        self._max_gen_toks, self._add_bos, self._prefix = max_gen_toks, add_bos_token, prefix_token_id
        self._max_length = self._llm.max_model_len
        self.enable_thinking = enable_thinking
        self._think_end: str | int | None = think_end_token
        if str(think_end_token).isdigit():
            self._think_end = int(str(think_end_token))
        self._template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_args["enable_thinking"] = enable_thinking

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SeesawLM:
        """From `--model_args`, which go before what the harness gives to every model: sizes of batches and a
        device."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        device = given.pop("device", None)
        chosen = {} if device is None or "device" in arg_dict else _device(device)
        return cls(**{**given, **chosen, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> SeesawLM:
        """As `create_from_arg_obj`, from one text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- what the harness asks of a model -----------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The tokeniser's end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        chosen = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return int(next(token for token in chosen if token is not None))

    @property
    def max_length(self) -> int:
        """Most tokens that the model sees at once."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Most tokens generated, unless a task says otherwise."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names requests that the harness caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside results."""
        deployment = self._llm.deployment
        return {
            "seesaw_version": __version__,
            "seesaw_plan": str(deployment.plan),
            "model_dtype": deployment.dtype,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Unless told, special tokens are added as `add_bos_token` says, else as the tokeniser does by
        default; to a text that begins with one, as chat templates make them, none."""
        if add_special_tokens is None:
            begins = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begins else self._add_bos
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without its system message if the template refuses that."""

        def render(messages: list[dict[str, str]]) -> str:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_args,
            )
            return str(text)

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template failed; it is applied without the system message")
            return render([message for message in chat_history if message["role"] != "system"])

    # ---- log-likelihoods ----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, and whether it is what greedy choice would give."""
        if self.enable_thinking:
            raise ConfigError(
                "enable_thinking=True: tasks that score given answers do not let the model think"
            )
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token behind as many before it as fit."""
        texts = [request.args[0] for request in requests]
        windows: list[Scored] = []
        counts = []
        for text in texts:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found: list[Scored] = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += found
            counts.append(len(found))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(parts)[0] for _ in range(count)) for count in counts]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Contexts that do not fit lose tokens on the left; the last token of a continuation takes no place."""
        asked = []
        for _, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ConfigError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)}: both need one at "
                    f"least, and the continuation may have {self.max_length}"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            start = len(tokens) - len(continuation)
            asked.append((tokens, _scoring(start)))
        self._say_truncated([len(c) + len(t) - self.max_length - 1 for _, c, t in requests])

        def answer(i: int, output: RequestOutput) -> tuple[float, bool]:
            text, _, continuation = requests[i]
            found = _loglikelihood(output, continuation)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found)
            return found

        return self._serve(asked, answer, "Running loglikelihood requests", disable_tqdm)

    # ---- generation ---------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's texts, up to the first stop string of each request."""
        asked, wanted, over = [], [], []
        for context, arguments in (request.args for request in requests):
            generation = Generation.read(arguments, self.tokenizer, self._max_gen_toks)
            if generation.max_tokens >= self.max_length:
                raise ConfigError(
                    f"max_gen_toks={generation.max_tokens}: leaves no room for a prompt; the model takes "
                    f"{self.max_length} tokens in all"
                )
            tokens = self.tok_encode(context)
            over.append(len(tokens) + generation.max_tokens - self.max_length)
            tokens, _ = maybe_truncate(tokens, generation.max_tokens, self.max_length, verbose=False)
            asked.append((tokens, generation.sampling(thinks=self._think_end is not None)))
            wanted.append(generation)
        self._say_truncated(over)

        def answer(i: int, output: RequestOutput) -> str:
            context, arguments = requests[i].args
            text = self._answer(output, wanted[i].until)
            self.cache_hook.add_partial("generate_until", (context, arguments), text)
            return text

        return self._serve(asked, answer, "Running generate_until requests", disable_tqdm)

    def _answer(self, output: RequestOutput, until: list[str]) -> str:
        """The text, without what the model thought before it."""
        text, tokens, end = output.outputs[0].text, output.outputs[0].token_ids, self._think_end
        if isinstance(end, int):
            if end in tokens:
                behind = tokens[len(tokens) - tokens[::-1].index(end) :]
                text = self.tokenizer.decode(behind, skip_special_tokens=True)
            text, end = text.lstrip(), None
        return str(postprocess_generated_text(text, until, end))

    # ---- the engine ---------------------------------------------------------------------------------------

    def _serve(
        self,
        asked: Sequence[tuple[list[int], SamplingParams]],
        answer: Callable[[int, RequestOutput], _T],
        what: str,
        silent: bool,
    ) -> list[_T]:
        """`answer` of every request, in their order; called as they are finished, so that no output is kept."""
        answers: dict[int, _T] = {}
        requests = (
            Request(id=str(number), prompt_token_ids=tuple(tokens), sampling=sampling)
            for number, (tokens, sampling) in enumerate(asked)
        )
        with tqdm(total=len(asked), desc=what, disable=silent) as bar:
            for output in self._llm.run(Counted(requests, asked)):
                if output.error is not None:
                    raise output.error
                number = int(output.request_id)
                answers[number] = answer(number, output)
                bar.update()
        return [answers[i] for i in range(len(asked))]

    def _say_truncated(self, over: Iterable[int]) -> None:
        cut = [tokens for tokens in over if tokens > 0]
        if cut:
            logger.warning(
                "%d requests are longer than max_length=%d and lose up to %d tokens on the left",
                *(len(cut), self.max_length, max(cut)),
            )


def _device(name: str) -> dict[str, str]:
    """The harness's choice as an option of `LLM`. Its default is the first GPU, and means nothing where there
    is none; the number goes, since the plan says how many devices there are."""
    kind = device_kind(name.split(":")[0])
    if kind.numbered:
        try:
            visible_gpus()
        except ConfigError:
            return {}
    return {"device": kind.name}


def _scoring(start: int) -> SamplingParams:
    """Log-probabilities of a prompt's tokens from number `start` on, and the most likely ones; nothing is
    generated."""
    return SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start)


def _loglikelihood(output: RequestOutput, continuation: list[int]) -> tuple[float, bool]:
    """Sum over the continuation, and whether each of its tokens is the most likely one."""
    assert output.prompt_logprobs is not None
    scored = output.prompt_logprobs[-len(continuation) :]
    total, greedy = 0.0, True
    for token, entries in zip(continuation, scored, strict=True):
        assert entries is not None
        total += entries[token].logprob
        greedy = greedy and len(entries) == 1  # the most likely one stands beside any other
    return total, greedy


def main(arguments: list[str]) -> None:
    """`lm_eval` with these arguments, where the model `seesaw` is known."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
