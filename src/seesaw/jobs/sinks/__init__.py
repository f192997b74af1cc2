"""Where the lines of a job go at its end: the formats of its output and error files."""
