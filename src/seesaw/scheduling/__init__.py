"""Who runs when: a deterministic state machine over requests, blocks and completions. No torch, no clock."""
