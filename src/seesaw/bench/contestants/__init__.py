"""The programs that run as contestants, each a process of its own."""
