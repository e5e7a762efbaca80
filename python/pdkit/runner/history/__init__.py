"""What became of earlier runs: a record of each in a JSON lines file, and what can be told from many."""
