"""Checks of a prefill/decode deployment, one module or folder for each.

A check is two things: a pure verdict over what was measured, with a report as its failure message, and a thin adapter,
`NameChecks`, whose test methods measure. A test class is some adapters, then what launches the servers:

    class TestDisaggregationDSV4Integrity(AccountingChecks, IntegrityChecks, ParityChecks, MonolithicBeside, PDServers):
        bitwise = True

An adapter names what it `needs` of that class; see `pdkit.checks.base`.
"""
