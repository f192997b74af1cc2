"""The `seesaw` command, one file per subcommand."""
