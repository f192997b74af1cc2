"""Which rank holds which weights, the host store they come from, and changing from one layout to another."""
