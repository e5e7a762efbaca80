"""The command `pdkit`: `main` knows the names of its sub-commands, each is a module with its options beside it."""
