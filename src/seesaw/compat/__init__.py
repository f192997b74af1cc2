"""What users of other engines bring along: their arguments, taken, refused, or said to have no effect."""
