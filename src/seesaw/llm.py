"""`LLM`: the public offline API, in the shape of vLLM's."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from seesaw.auto import auto_for
from seesaw.compat.bar import Bar, with_bar
from seesaw.compat.vllm_calls import check_call, check_prompt, missing
from seesaw.compat.vllm_engine import engine_options
from seesaw.core.errors import ConfigError, RequestError
from seesaw.core.request import Request, RequestOutput
from seesaw.core.sampling import SamplingParams
from seesaw.core.stats import EngineStats
from seesaw.defaults import default_sampling
from seesaw.deployment import Deployment, resolve
from seesaw.engine import Engine
from seesaw.hub import find_model
from seesaw.launch import LocalNode
from seesaw.options import Options
from seesaw.preflight.gate import check_plan
from seesaw.recording.bounded import History
from seesaw.recording.trace import TraceWriter
from seesaw.recording.tracing import EngineTrace
from seesaw.rows import Counted
from seesaw.text import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, `{"prompt": text}`, `{"prompt_token_ids": [...]}`, or token ids."""


class LLM:
    """A model on the ranks of this node, ready to generate.

        with LLM("path/to/model", plan="P2->T2") as llm:
            for output in llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=20)):
                print(output.outputs[0].text)

    `model` is a folder, or the name of a model in the local Hugging Face cache. Arguments are those of
    `seesaw.options.Options`, and

    - `tokenizer`: a path if it is not the model's own, False for none (prompts are token ids then);
    - `chat_template`: a template or the file of one, for `chat` in place of the model's own;
    - `generation_config`, `override_generation_config`: where `generate` takes settings from when it is given none
      (`seesaw.defaults`);
    - `revision`, `tokenizer_revision`, `download_dir`: of models and tokenisers in the Hugging Face cache;
    - those of vLLM's `LLM`, as docs/from-vllm.md has them.

    Raises a `ConfigError` before any worker starts if they cannot be used, `StartupError` or `WorkerError` if the
    workers do not come up.

    With `plan="auto"`, the default, and a profile of this machine (`seesaw profile`), the workers start when the
    first rows are known: the planner chooses by their lengths, and may change the plan while a job runs if others
    turn out very different. Tokens do not depend on it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | bool | None = True,
        skip_tokenizer_init: bool = False,
        chat_template: str | Path | None = None,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        download_dir: str | None = None,
        **options: Any,
    ) -> None:
        known = engine_options(options, set(Options.__dataclass_fields__) - {"model"})
        from seesaw.execution.fork_server import fork_server

        started = time.monotonic()

        fork_server()  # it imports torch while this process reads config and tokeniser
        folder = find_model(model, revision=revision, cache=download_dir)
        deployment = resolve(Options(model=str(folder), **known))
        self._defaults = default_sampling(folder, generation_config, override_generation_config)
        self._chat_template = _read_template(chat_template)
        if tokenizer is not None and not isinstance(tokenizer, bool):
            tokenizer = find_model(tokenizer, revision=tokenizer_revision, cache=download_dir)
        self.tokenizer = None if skip_tokenizer_init else _load_tokenizer(str(folder), tokenizer)
        deployment = check_plan(deployment)
        writer = None if deployment.options.trace is None else TraceWriter(deployment.options.trace)
        self._node = LocalNode(None if writer is None else writer.add)
        # at exit too, and before the interpreter is taken down, which `__del__` would not be
        self._close = weakref.finalize(self, _close, self._node, writer)
        auto = auto_for(deployment)
        trace = None if writer is None else EngineTrace(writer)
        self._engine = Engine(
            deployment, self._node, self.tokenizer, start=self._node.start, auto=auto, trace=trace
        )
        if auto is None:
            self._start()
        self._start_seconds = time.monotonic() - started
        self._requests = 0

    @property
    def deployment(self) -> Deployment:
        """The plan, shardings and memory that were chosen; of plan `auto`, before its first rows, by rule."""
        return self._engine.deployment

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt included.

        Where it was not asked for and memory bounds it, the plan that `auto` chooses may lower it.
        """
        return self.deployment.memory.max_model_len

    @property
    def busy_cores(self) -> int:
        """Cores of this machine that the ranks keep busy."""
        return self.deployment.plan.world * self.deployment.options.threads_per_rank

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's Hugging Face tokeniser: a copy, the same one each time, which the engine does not look at."""
        return self._shown_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` and `chat` do where they are given no `sampling_params`: as the model recommends."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = False,
        **others: Any,
    ) -> Iterator[RequestOutput] | list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        A single prompt or anything with a length gives a list. An iterator is pulled lazily and gives an iterator,
        and memory stays constant. One `SamplingParams` serves all prompts, an iterable gives each its own; without,
        settings are those that the model recommends. `use_tqdm=True` shows a bar; `others` are arguments of vLLM's.
        Raises `RequestError` naming the prompt that cannot be served (an iterator's outputs carry `error`).
        """
        check_call("generate", others)
        if prompts is None:
            raise ConfigError("generate: there are no prompts")
        several = cast("Iterable[Prompt]", [prompts] if _is_single(prompts) else prompts)
        return self._complete(several, several, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Iterable[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: Bar = False,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_arguments: Any,
    ) -> Iterator[RequestOutput] | list[RequestOutput]:
        """Answer conversations (lists of `{"role", "content"}`) through the model's chat template.

        A single conversation may be given alone. `chat_template` takes the place of the model's own. What
        `template_arguments` and `chat_template_kwargs` hold goes to the template: `add_generation_prompt`,
        `continue_final_message`, `tools`, variables of its own.
        """
        given = check_call("chat", template_arguments, others=True) | dict(chat_template_kwargs or {})
        if given.get("continue_final_message") and given.get("add_generation_prompt"):
            raise RequestError(
                "chat: continue_final_message and add_generation_prompt exclude each other; give one of them",
                code="invalid_value",
                param="continue_final_message",
            )
        template = chat_template or self._chat_template
        if template is not None:
            given["chat_template"] = template
        single = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], Mapping)
        several = cast("Iterable[Sequence[Mapping[str, Any]]]", [messages] if single else messages)
        tokenizer = self._need_tokenizer("chat")

        def rendered() -> Iterator[Prompt | RequestError]:
            for each in several:
                try:
                    text, ids = tokenizer.render_prompt(each, **given)
                except RequestError as error:
                    yield error
                else:
                    yield {"prompt": text, "prompt_token_ids": ids}

        return self._complete(rendered(), several, sampling_params, use_tqdm)

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """Serve requests as they are pulled; outputs come as they are finished, failures with `error` set."""
        return self._engine.run(iter(requests))

    def stats(self) -> EngineStats:
        """Where the engine stands: rows, tokens, phase, memory, transitions."""
        stats = self._engine.stats()
        return replace(stats, start_seconds=self._start_seconds + stats.start_seconds)

    def history(self) -> History:
        """How the engine came to where it stands: its phases, and the lengths of what it served."""
        return self._engine.history()

    def close(self) -> None:
        """End the workers and free their memory. May be called twice."""
        self._close()

    def _start(self) -> None:
        try:
            self._engine.start()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        raise missing(name)

    @cached_property
    def _shown_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._need_tokenizer("get_tokenizer").hugging_face()

    # ---- requests -----------------------------------------------------------------------------------------

    def _complete(
        self,
        prompts: Iterable[Prompt | RequestError],
        of: Iterable[object],
        sampling: SamplingParams | Iterable[SamplingParams] | None,
        use_tqdm: Bar,
    ) -> Iterator[RequestOutput] | list[RequestOutput]:
        """Complete the prompts that were made of the items of `of`; those that are errors are refused with them."""
        _check_lengths(of, sampling)
        requests = self._make_requests(prompts, sampling)
        if not isinstance(of, Sized):
            return self._in_order(requests, of, use_tqdm)
        made = list(requests)
        _raise_refusals(made)  # before any other prompt has taken its time
        outputs = list(self._in_order(iter(made), made, use_tqdm))
        _raise_refusals(outputs)
        return outputs

    def _in_order(
        self, requests: Iterator[Request | RequestOutput], of: Iterable[object], use_tqdm: Bar
    ) -> Iterator[RequestOutput]:
        """Outputs in the order of `requests`, made of the items of `of`; refusals among them as they are."""
        order: list[str] = []
        held: dict[str, RequestOutput] = {}

        def noted() -> Iterator[Request]:
            for request in requests:
                if isinstance(request, RequestOutput):
                    order.append(request.request_id)
                    held[request.request_id] = request
                    continue
                order.append(request.id)
                yield request

        position = 0
        total = len(of) if isinstance(of, Sized) else None
        for output in with_bar(self.run(Counted(noted(), of)), total, use_tqdm):
            output.prompt_token_ids = list(output.prompt_token_ids)
            held[output.request_id] = output
            while position < len(order) and order[position] in held:
                yield held.pop(order[position])
                position += 1
            if position > 4096:
                del order[:position]
                position = 0
        yield from map(held.pop, order[position:])  # refusals behind the last request

    def _make_requests(
        self,
        prompts: Iterable[Prompt | RequestError],
        sampling: SamplingParams | Iterable[SamplingParams] | None,
    ) -> Iterator[Request | RequestOutput]:
        """Requests, and outputs for prompts that cannot become any."""
        shared = sampling if isinstance(sampling, SamplingParams) else None
        each = None if sampling is None or shared is not None else iter(sampling)  # type: ignore[arg-type]
        default = self.get_default_sampling_params()
        for prompt in prompts:
            params = shared or (default if each is None else next(each, None))
            if params is None:
                raise ConfigError("generate: there are fewer sampling_params than prompts")
            number = str(self._requests)
            self._requests += 1
            try:
                text, tokens = self._tokens(prompt)
            except RequestError as error:
                yield RequestOutput(request_id=number, prompt=None, prompt_token_ids=[], error=error)
            else:
                yield Request(id=number, prompt=text, prompt_token_ids=tuple(tokens), sampling=params)

    def _tokens(self, prompt: Prompt | RequestError) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, RequestError):
            raise prompt
        if isinstance(prompt, Mapping):
            check_prompt(prompt)
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), prompt["prompt_token_ids"]
            if not isinstance(prompt.get("prompt"), str):
                raise RequestError(
                    f"a prompt given as a mapping needs 'prompt' or 'prompt_token_ids', not {sorted(prompt)}",
                    param="prompt",
                )
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer("text prompts").encode(prompt)
        return None, prompt  # type: ignore[return-value]

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                f"{what}: the model has no tokeniser; give prompt_token_ids, or pass tokenizer=PATH"
            )
        return self.tokenizer


def _raise_refusals(several: Sequence[Request | RequestOutput]) -> None:
    """Raise the first `RequestError` among them, which names its prompt then."""
    for number, output in enumerate(several):
        if isinstance(output, RequestOutput) and output.error is not None:
            error = output.error
            raise RequestError(f"prompt {number}: {error}", code=error.code, param=error.param)


def _check_lengths(prompts: object, sampling: object) -> None:
    """Raise `ConfigError` if there are lists of different lengths."""
    if isinstance(prompts, Sized) and isinstance(sampling, Sized) and len(prompts) != len(sampling):
        raise ConfigError(f"generate: {len(prompts)} prompts, but {len(sampling)} sampling_params")


def _close(node: LocalNode, writer: TraceWriter | None) -> None:
    """End the workers, whose last events go into the trace."""
    try:
        node.close()
    finally:
        if writer is not None:
            writer.close()


def _is_single(prompts: object) -> bool:
    if isinstance(prompts, (str, Mapping)):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)


def _read_template(template: str | Path | None) -> str | None:
    """A chat template given as text or as a file, by vLLM's rule: a text with braces or newlines is a template."""
    if template is None:
        return None
    text = str(template)
    if not isinstance(template, Path) and any(mark in text for mark in "{}\n"):
        return text
    try:
        return Path(template).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template={text!r}: neither a template nor a file of one ({error})"
        ) from error


def _load_tokenizer(model: str, tokenizer: str | Path | bool | None) -> Tokenizer | None:
    """The tokeniser asked for; a model directory without one gives none."""
    if tokenizer is False:
        return None
    if tokenizer not in (None, True):
        return Tokenizer.load(str(tokenizer))
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any((Path(model) / name).exists() for name in files):
        return None
    return Tokenizer.load(model)


__all__ = ["LLM"]
