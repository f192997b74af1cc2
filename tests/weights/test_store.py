"""The host store gives exactly the tensors of a checkpoint, and says what is wrong with a broken one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seesaw.core.errors import ModelError
from seesaw.core.model_spec import DType
from seesaw.models.hf_config import load_spec
from seesaw.models.parameters import LM_HEAD, parameter_count, parameters
from seesaw.weights.store import TORCH_DTYPES, HostWeightStore, StoreSource
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.weights.shapes import TINY, TINY_TIED, spec_of

BIASED: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_opens_what_transformers_saves(tmp_path: Path, family: str, sharded: bool) -> None:
    """transformers is the oracle for names and shapes, safetensors for the values."""
    size = 50_000 if sharded else None
    make_checkpoint(tmp_path, family, max_shard_size=size, dtype=torch.bfloat16, **BIASED.get(family, {}))
    spec = load_spec(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    expected: dict[str, Tensor] = {}
    for file in files:
        expected |= load_file(file)
    store = HostWeightStore.open(tmp_path, spec)
    assert {parameter.name for parameter in parameters(spec)} == expected.keys()
    assert parameter_count(spec) == sum(tensor.numel() for tensor in expected.values())
    for name, tensor in expected.items():
        assert store.tensor(name).dtype == tensor.dtype
        assert torch.equal(store.tensor(name), tensor)
    source = pickle.loads(pickle.dumps(store.source))
    with source.open() as other:
        name = parameters(spec)[0].name
        assert torch.equal(other.tensor(name), expected[name])


def test_views_are_of_the_mapped_file_and_outlive_the_store(tmp_path: Path) -> None:
    write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = HostWeightStore.open(tmp_path, TINY)
    name = parameters(TINY)[1].name
    again = store.tensor(name)
    assert again.data_ptr() == store.tensor(name).data_ptr()
    assert str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()
    values = again.clone()
    store.close()
    store.close()
    assert torch.equal(again, values)
    del again, store
    assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text()


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {p.name: torch.full(p.shape, float(i)).to(dtype) for i, p in enumerate(parameters(TINY))}


def write(directory: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    save_file(tensors or weights(), directory / "model.safetensors")
    return directory / "model.safetensors"


NAME = "model.layers.3.mlp.down_proj.weight"
Breaker = Callable[[Path], object]


def without_parameter(directory: Path) -> None:
    write(directory, {name: tensor for name, tensor in weights().items() if name != NAME})


def with_shape(directory: Path) -> None:
    write(directory, {**weights(), NAME: torch.zeros(4, 12)})


def with_dtype(directory: Path) -> None:
    write(directory, {**weights(), NAME: torch.zeros(4, 11, dtype=torch.int8)})


def with_surplus(directory: Path) -> None:
    write(directory, {**weights(), NAME.replace("weight", "weight_scale"): torch.zeros(4)})


def cut_data(directory: Path) -> None:
    file = write(directory)
    file.write_bytes(file.read_bytes()[:-10])


def cut_header(directory: Path) -> None:
    file = write(directory)
    file.write_bytes(file.read_bytes()[:100])


def cut_prefix(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x01")


def not_json(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{nothing")


def not_object(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def header_edited(edit: Callable[[dict[str, Any]], object]) -> Breaker:
    def damage(directory: Path) -> None:
        file = write(directory)
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def lfs_pointer(directory: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
    (directory / "model.safetensors").write_text(pointer)


def pickles(directory: Path) -> None:
    for number in range(5):
        (directory / f"pytorch_model-{number}.bin").write_bytes(b"x")


def index(content: object) -> Breaker:
    return lambda directory: (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def index_and_file(directory: Path) -> None:
    write(directory).rename(directory / "a.safetensors")
    index({"weight_map": dict.fromkeys(weights(), "a.safetensors") | {"x": "b.safetensors"}})(directory)


BROKEN: dict[str, tuple[Breaker, list[str]]] = {
    "nothing": (lambda directory: None, ["neither model.safetensors nor model.safetensors.index.json"]),
    "parameter missing": (without_parameter, ["model.safetensors", NAME, "[4, 11]", "missing"]),
    "shape": (with_shape, ["model.safetensors", NAME, "[4, 12]", "[4, 11]"]),
    "type": (with_dtype, ["model.safetensors", NAME, "I8", "F32, BF16 and F16"]),
    "surplus": (with_surplus, ["1 tensors", "down_proj.weight_scale"]),
    "data cut": (cut_data, ["model.safetensors", "truncated", "ends at byte"]),
    "header cut": (cut_header, ["model.safetensors", "truncated", "100 bytes"]),
    "prefix cut": (cut_prefix, ["truncated", "1 bytes"]),
    "not json": (not_json, ["header is not JSON"]),
    "not an object": (not_object, ["not a JSON object"]),
    "entry": (header_edited(lambda header: header[NAME].pop("shape")), [NAME, "malformed"]),
    "entry type": (header_edited(lambda header: header.update({NAME: 3})), [NAME, "malformed"]),
    "span": (header_edited(lambda h: h[NAME].update(data_offsets=[0, 8])), [NAME, "needs 176 bytes", "8"]),
    "before": (header_edited(lambda h: h[NAME].update(data_offsets=[-176, 0])), [NAME, "176 bytes"]),
    "beyond": (
        header_edited(lambda h: h[NAME].update(data_offsets=[2**50, 2**50 + 176])),
        [NAME, "truncated"],
    ),
    "lfs": (lfs_pointer, ["Git LFS pointer", "git lfs pull"]),
    "pickles": (pickles, ["pickle", "pytorch_model-0.bin", "2 more", "convert them to safetensors"]),
    "index without map": (index({}), ["model.safetensors.index.json", "not an index"]),
    "index with list": (index({"weight_map": ["a"]}), ["not an index"]),
    "index with numbers": (index({"weight_map": {"a": 3}}), ["not an index"]),
    "index empty": (index({"weight_map": {}}), ["weight_map"]),
    "index elsewhere": (index({"weight_map": {"a": "../model.safetensors"}}), ["beside it", "../model"]),
    "index of missing": (index_and_file, ["1 of the 2 files", "b.safetensors", "download is incomplete"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories(tmp_path: Path, case: str) -> None:
    damage, words = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(ModelError) as caught:
        HostWeightStore.open(tmp_path, TINY)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert all(word in message for word in words), message


def test_a_file_is_not_a_model_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", write(tmp_path)):
        with pytest.raises(ModelError, match="not a directory"):
            HostWeightStore.open(path, TINY)


def test_harmless_extras_are_accepted(tmp_path: Path) -> None:
    """A copy of the tied embedding, and buffers of old checkpoints; also data that is not aligned."""
    named = {p.name: torch.randn(p.shape) for p in parameters(TINY_TIED)}
    extras = {LM_HEAD: torch.zeros(17, 4), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    file = write(tmp_path, {**named, **extras})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padded = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    file.write_bytes(padded)
    store = HostWeightStore.open(tmp_path, TINY_TIED)
    assert all(torch.equal(store.tensor(name), tensor) for name, tensor in named.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dummy_weights(dtype: DType) -> None:
    with HostWeightStore.dummy(TINY, dtype, 1) as store, HostWeightStore.dummy(TINY, dtype, 2) as other:
        again = HostWeightStore.dummy(TINY, dtype, 1)
        shared = HostWeightStore.attach_dummy(store.fd, TINY, dtype)
        for parameter in parameters(TINY):
            tensor = store.tensor(parameter.name)
            assert (tensor.shape, tensor.dtype) == (parameter.shape, TORCH_DTYPES[dtype])
            assert torch.equal(tensor, again.tensor(parameter.name))
            assert torch.equal(tensor, shared.tensor(parameter.name))
            if parameter.name.endswith("norm.weight"):
                assert torch.equal(tensor, torch.ones_like(tensor))
            else:
                assert not torch.equal(tensor, other.tensor(parameter.name))
                assert 0 < tensor.float().abs().max() < 0.2
        queries = [store.tensor(f"model.layers.{layer}.self_attn.q_proj.weight") for layer in range(8)]
        assert torch.unique(torch.stack(queries), dim=0).shape[0] == 8, "no two layers are equal"
        again.close()
        shared.close()


def test_dummy_weights_repeat_a_pattern_that_large_matrices_exceed() -> None:
    spec = spec_of(layers=1, vocab=3000, hidden=512, heads=4, kv_heads=2, ffn=64)
    with HostWeightStore.dummy(spec, "float32", 0) as store:
        embedding = store.tensor("model.embed_tokens.weight")
        assert torch.unique(embedding[:, :4], dim=0).shape[0] == 3000, "no two rows are equal"
        assert embedding.std().item() == pytest.approx(0.02, rel=0.02)
        down = store.tensor("model.layers.0.mlp.down_proj.weight")
        assert down.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)


def test_dummy_weights_of_another_model_are_refused() -> None:
    with HostWeightStore.dummy(TINY, "float32", 0) as store:
        with pytest.raises(ModelError, match="bytes, the model needs"):
            HostWeightStore.attach_dummy(store.fd, TINY_TIED, "float32")
        source = store.source
    with pytest.raises(ModelError, match="cannot be opened"):
        StoreSource("/proc/self/fd/9999", TINY, "float32").open()
    assert source.dummy_dtype == "float32"


def test_another_process_maps_the_same_dummy_weights() -> None:
    code = (
        "import pickle, sys; source = pickle.load(sys.stdin.buffer); store = source.open();"
        "print(store.tensor('model.embed_tokens.weight').double().sum().item().hex())"
    )
    with HostWeightStore.dummy(TINY, "float32", 7) as store:
        sent = pickle.dumps(store.source)
        reply = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
        expected = store.tensor("model.embed_tokens.weight").double().sum().item()
    assert float.fromhex(reply.stdout.decode().strip()) == expected
