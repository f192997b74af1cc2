"""What a run leaves behind so that it explains itself: its trace, and its record beside the output."""
