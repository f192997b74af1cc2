"""The two KV tiers, the device pool of a rank and the host buffer of the node, and copies between them."""
