"""Checks a deployment of prefill and decode that is already there, over HTTP: nothing is launched or ended."""

from pdkit.checks.external.command import EPILOG, add_arguments, main

__all__ = ["EPILOG", "add_arguments", "main"]
