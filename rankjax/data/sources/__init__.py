"""Data sets, one file each: a function `prepare` that returns a log directory."""
