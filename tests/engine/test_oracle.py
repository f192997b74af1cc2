"""Greedy float32 output equals transformers' own, token for token, whatever the plan, policy and loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from seesaw import LLM, SamplingParams
from tests.checkpoints import FAMILIES, clear_prompts, make_checkpoint
from tests.engine.cases import Case, cases, rotated

NEW_TOKENS = 40
LENGTHS = (1, 2, 7, 16, 17, 31, 48, 64, 65, 100, 129, 200, 257, 333, 480, 600, 5, 40)

Oracle = tuple[Path, list[list[int]], list[list[int]]]


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """Checkpoint, prompts and expected continuations of each family; filled as they are needed."""
    return {}


def oracle(family: str, made: dict[str, Oracle], factory: pytest.TempPathFactory) -> Oracle:
    """The oracle of a family, computed once per session."""
    if family not in made:
        # llama takes the native attention kernels, qwen2 (head_dim 10) those in torch
        sizes = {"head_dim": 16} if family == "llama" else {}
        path = make_checkpoint(factory.mktemp(family), family, max_position_embeddings=1024, **sizes)
        prompts, expected = clear_prompts(path, LENGTHS, NEW_TOKENS)
        made[family] = (path, prompts, expected)
    return made[family]


def run(path: Path, prompts: list[list[int]], case: Case) -> list[list[int]]:
    """The engine's continuations: all prompts at once, or with room so small that they queue and take turns."""
    with LLM(
        path,
        plan=case.plan,
        policy=case.policy,
        overlap=case.overlap,
        dtype="float32",
        device_memory="12MiB",
        host_kv="1500KiB",
        block_size=8,
        chunk=256,
        max_running=18 if case.overlap else 6,
        max_model_len=680,
        tokenizer=False,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
        return [output.outputs[0].token_ids for output in outputs]


def check(family: str, case: Case, made: dict[str, Oracle], factory: pytest.TempPathFactory) -> None:
    path, prompts, expected = oracle(family, made, factory)
    assert run(path, prompts, case) == expected


QUICK = [
    (family, case)
    for turn, family in enumerate(FAMILIES)
    for case in (*rotated((1, 2), turn)[turn::7], *rotated((4,), turn)[turn::9])
]
EVERY = [(family, case) for turn, family in enumerate(FAMILIES) for case in rotated((1, 2, 4), turn)]


def name(value: object) -> str:
    return str(value)


@pytest.mark.parametrize(("family", "case"), QUICK, ids=name)
def test_equals_transformers(
    family: str, case: Case, oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(family, case, oracles, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), EVERY, ids=name)
def test_equals_transformers_under_every_plan(
    family: str, case: Case, oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(family, case, oracles, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*cases(1), *cases(2), *cases(4)], ids=name)
def test_every_policy_in_both_loops(
    case: Case, oracles: dict[str, Oracle], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check("llama", case, oracles, tmp_path_factory)
