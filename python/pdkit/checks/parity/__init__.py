"""Parity: a pair must answer as one monolithic server of the same model does."""
