"""Keys of sampling noise: who draws which random number is fixed by names, not by the order of work."""

from __future__ import annotations

from hashlib import blake2b


def noise_key(engine_seed: int, request_id: str, sample_index: int, request_seed: int | None) -> int:
    """63-bit key of the noise of completion `sample_index` of a request, the same in every process and run.

    A request with a seed of its own gets the same noise whatever its id and the engine's seed.
    """
    owner = f"seed:{request_seed}" if request_seed is not None else f"id:{engine_seed}:{request_id}"
    # Ids come from users, and a Python string may hold lone surrogates.
    name = f"{owner}#{sample_index}".encode("utf-8", "surrogatepass")
    digest = blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
