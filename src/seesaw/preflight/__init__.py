"""What is looked at before a long job starts: that ranks can really talk, memory and limits, disk."""
