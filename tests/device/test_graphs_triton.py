"""A job by graphs with the Triton kernels, in Triton's interpreter: they leave padding out by themselves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from seesaw.execution import graphs as graphs_module
from tests import triton_interpreter  # before any module of kernels
from tests.device.ranks import captured
from tests.device.test_graphs import noted
from tests.device.test_order import answers

from seesaw.attention.triton_backend import TritonAttention  # isort: skip

triton_interpreter.skip_unless_interpreting()


class OneAtATime(TritonAttention):
    """The interpreter serves one thread."""

    lock = threading.Lock()

    def attend(self, *arguments: Any, **options: Any) -> Tensor:
        """See `AttentionBackend.attend`."""
        with self.lock:
            return super().attend(*arguments, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of padded rows, which are not stored
def test_padded_steps_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = answers(tmp_path, "P2->T2", prompts=2, tokens=3)
    steps = noted(monkeypatch)
    monkeypatch.setattr(graphs_module, "graph_batches", lambda most: (3,))
    with captured(monkeypatch, attention=OneAtATime(1)) as watch:
        found, _ = answers(tmp_path, "P2->T2", prompts=2, tokens=3)
    assert found == expected
    assert len(watch.cuda.replays) == len(steps) > 0
    assert any(count < size for count, size in steps)
