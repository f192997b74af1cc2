"""`LLM`: the public offline API, in the shape of vLLM's."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from seesaw.auto import auto_for
from seesaw.core.errors import ConfigError, RequestError
from seesaw.core.request import Request, RequestOutput
from seesaw.core.sampling import SamplingParams
from seesaw.core.stats import EngineStats
from seesaw.deployment import Deployment, resolve
from seesaw.engine import Engine
from seesaw.launch import LocalNode
from seesaw.options import Options
from seesaw.preflight.gate import check_plan
from seesaw.recording.bounded import History
from seesaw.recording.trace import TraceWriter
from seesaw.recording.tracing import EngineTrace
from seesaw.rows import Counted
from seesaw.text import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, `{"prompt": text}`, `{"prompt_token_ids": [...]}`, or token ids."""


class LLM:
    """A model on the ranks of this node, ready to generate.

        with LLM("path/to/model", plan="P2->T2") as llm:
            for output in llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=20)):
                print(output.outputs[0].text)

    Arguments are those of `seesaw.options.Options`, and `tokenizer`: a path if it is not the model's own,
    False for none (prompts are token ids then). Raises a `ConfigError` before any worker starts if they cannot
    be used, `StartupError` or `WorkerError` if the workers do not come up.

    With `plan="auto"`, the default, and a profile of this machine (`seesaw profile`), the workers start when the
    first rows are known: the planner chooses by their lengths, and may change the plan while a job runs if others
    turn out very different. Tokens do not depend on it.
    """

    def __init__(self, model: str | Path, *, tokenizer: str | Path | bool = True, **options: Any) -> None:
        known = set(Options.__dataclass_fields__) - {"model"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"LLM: unknown argument {unknown[0]!r}; known are {', '.join(sorted(known))}")
        from seesaw.execution.fork_server import fork_server

        started = time.monotonic()

        fork_server()  # it imports torch while this process reads config and tokeniser
        deployment = resolve(Options(model=str(model), **options))
        self.tokenizer = _load_tokenizer(str(model), tokenizer)
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

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput] | list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        A single prompt or a sequence of them gives a list. An iterator is pulled lazily and gives an iterator,
        and memory stays constant. One `SamplingParams` serves all prompts, an iterable gives each its own.
        Raises `RequestError` naming the prompt that cannot be served (an iterator's outputs carry `error`).
        """
        several = cast("Iterable[Prompt]", [prompts] if _is_single(prompts) else prompts)
        requests = self._make_requests(several, sampling_params)
        if isinstance(several, Sequence):
            return self._generate_list(list(requests))
        return self._in_order(requests, several)

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Iterable[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        **template_arguments: Any,
    ) -> Iterator[RequestOutput] | list[RequestOutput]:
        """Answer conversations (lists of `{"role", "content"}`) through the model's chat template."""
        single = isinstance(conversations, Sequence) and bool(conversations)
        if single and isinstance(conversations[0], Mapping):  # type: ignore[index]
            conversations = [cast("Sequence[Mapping[str, Any]]", conversations)]
        several = cast("Iterable[Sequence[Mapping[str, Any]]]", conversations)
        tokenizer = self._need_tokenizer("chat")
        prompts = (
            {"prompt_token_ids": tokenizer.render_chat(messages, **template_arguments)}
            for messages in several
        )
        if isinstance(several, Sequence):
            return self.generate(list(prompts), sampling_params)
        return self.generate(prompts, sampling_params)

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

    # ---- requests -----------------------------------------------------------------------------------------

    def _generate_list(self, requests: list[Request]) -> list[RequestOutput]:
        outputs = list(self._in_order(iter(requests), requests))
        for number, output in enumerate(outputs):
            if output.error is not None:
                error = output.error
                raise RequestError(f"prompt {number}: {error}", code=error.code, param=error.param)
        return outputs

    def _in_order(self, requests: Iterator[Request], of: Iterable[object]) -> Iterator[RequestOutput]:
        """Outputs in the order of `requests`, which are made of the items of `of`."""
        order: list[str] = []

        def noted() -> Iterator[Request]:
            for request in requests:
                order.append(request.id)
                yield request

        held: dict[str, RequestOutput] = {}
        position = 0
        for output in self.run(Counted(noted(), of)):
            held[output.request_id] = output
            while position < len(order) and order[position] in held:
                yield held.pop(order[position])
                position += 1
            if position > 4096:
                del order[:position]
                position = 0

    def _make_requests(
        self, prompts: Iterable[Prompt], sampling: SamplingParams | Iterable[SamplingParams] | None
    ) -> Iterator[Request]:
        shared = sampling if isinstance(sampling, SamplingParams) else None
        each = None if sampling is None or shared is not None else iter(sampling)  # type: ignore[arg-type]
        for prompt in prompts:
            params = shared or (SamplingParams() if each is None else next(each, None))
            if params is None:
                raise ConfigError("generate: there are fewer sampling_params than prompts")
            text, tokens = self._tokens(prompt)
            self._requests += 1
            yield Request(
                id=str(self._requests - 1), prompt=text, prompt_token_ids=tuple(tokens), sampling=params
            )

    def _tokens(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
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


def _load_tokenizer(model: str, tokenizer: str | Path | bool) -> Tokenizer | None:
    """The tokeniser asked for; a model directory without one gives none."""
    if tokenizer is False:
        return None
    if tokenizer is not True:
        return Tokenizer.load(str(tokenizer))
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any((Path(model) / name).exists() for name in files):
        return None
    return Tokenizer.load(model)


__all__ = ["LLM"]
