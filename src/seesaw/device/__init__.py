"""What a rank computes on: streams of work, the events between them, and memory that reaches them."""
