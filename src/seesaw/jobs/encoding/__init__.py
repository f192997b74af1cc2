"""Rows made into requests ahead of need, their prompts tokenised by processes of their own."""
