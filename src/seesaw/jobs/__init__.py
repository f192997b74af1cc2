"""Job files in and out: rows read from JSONL, driven through an engine, answered in OpenAI's shapes."""
