"""How tensors get from rank to rank: shared memory on one host, sockets between networks, Gloo as a fallback."""
