"""An engine whose answers follow from the prompt, so that a mixed-up row shows; and its byte tokeniser.

It is a `JobEngine` as the real one is: pulls boundedly, answers out of order, refuses what is too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from seesaw.core.errors import RequestError
from seesaw.core.request import CompletionOutput, Request, RequestOutput, TokenLogprob
from seesaw.core.stats import EngineStats, TransitionRecord

WINDOW = 7


class ByteTokenizer:
    """Token i is byte i; a chat is its contents, one per line, behind the role."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        if not messages or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        ):
            raise RequestError("messages: no content", code="invalid_messages", param="messages")
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return self.encode(text + "".join(f"{k}={v}" for k, v in sorted(kwargs.items())))


class EchoEngine:
    """Answers with the prompt's bytes from the end, `max_tokens` of them at most."""

    def __init__(self, *, max_model_len: int = 200, fail_after: int | None = None) -> None:
        self.tokenizer = ByteTokenizer()
        self.max_model_len = max_model_len
        self.busy_cores = 1
        self.fail_after = fail_after
        self.error: BaseException = KeyboardInterrupt()
        self.held = 0
        """Most requests held at once."""
        self.closed = False
        self.requests: list[Request] = []
        self._finished = 0

    def run(self, requests: Iterator[Request], /) -> Iterator[RequestOutput]:
        window: list[Request] = []
        for request in requests:
            self.requests.append(request)
            window.append(request)
            self.held = max(self.held, len(window))
            if len(window) == WINDOW:
                yield self._answer(window.pop(len(self.requests) % WINDOW))
        while window:
            yield self._answer(window.pop())

    def _answer(self, request: Request) -> RequestOutput:
        if self._finished == self.fail_after:
            raise self.error
        self._finished += 1
        prompt = request.prompt_token_ids
        output = RequestOutput(request_id=request.id, prompt=request.prompt, prompt_token_ids=prompt)
        if len(prompt) >= self.max_model_len:
            output.error = RequestError(
                "the prompt is too long", code="context_length_exceeded", param="prompt"
            )
        else:
            output.outputs = [self._choice(request, i) for i in range(request.sampling.n)]
        return output

    def _choice(self, request: Request, index: int) -> CompletionOutput:
        sampling = request.sampling
        room = min(sampling.max_tokens, self.max_model_len - len(request.prompt_token_ids))
        tokens = [b % 256 for b in request.prompt_token_ids[::-1]]
        taken = tokens[:room]
        logprobs = None if sampling.logprobs is None else [_entries(t, sampling.logprobs) for t in taken]
        return CompletionOutput(
            index=index,
            token_ids=taken,
            text=bytes(taken).decode(errors="replace"),
            finish_reason="length" if len(taken) < len(tokens) else "stop",
            logprobs=logprobs,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            plan="P2->T2",
            phase="decode",
            requests_waiting=0,
            requests_running=0,
            requests_finished=self._finished,
            requests_failed=0,
            prompt_tokens=sum(len(r.prompt_token_ids) for r in self.requests),
            output_tokens=0,
            elapsed_seconds=2.0,
            seconds_per_phase={"prefill": 0.5, "decode": 1.0},
            transitions=(TransitionRecord("T2", 3 << 20, 0.25, "delta"),),
            swapped_out_bytes=1 << 20,
            swapped_in_bytes=1 << 20,
            preemptions_swapped=4,
            preemptions_recomputed=0,
            device_memory_peak_bytes=(5 << 20, 6 << 20),
            device_memory_budget_bytes=8 << 20,
            host_kv_peak_bytes=1 << 20,
            host_kv_budget_bytes=2 << 20,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True


def _entries(token: int, top: int) -> dict[int, TokenLogprob]:
    """The chosen token is the second most likely; the third is impossible."""
    ranked = [(token + 1) % 256, token, *((token + i) % 256 for i in range(2, 20))][: max(top, 2)]
    every = {
        t: TokenLogprob(
            float("-inf") if rank > 2 else -float(rank), rank, bytes([t]).decode(errors="replace")
        )
        for rank, t in enumerate(ranked, 1)
    }
    chosen = {token: every.pop(token)}
    return chosen | dict(list(every.items())[:top])
