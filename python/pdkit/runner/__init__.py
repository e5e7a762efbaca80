"""Selects and runs test files, supervises them, and reports what they left; knows what a machine can run."""
