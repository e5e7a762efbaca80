"""Faults of a KV transfer, by name, and the places where they are injected while the servers stay up.

library         what can go wrong, and which real bug it resembles
switch          which of it is on
transfer        injects it between prefill and decode of the embedded engine
engine          injects it into a server beside the transfer
load_balancer   injects it between clients and servers, through messages
kinds           families of faults with a parameter: from where on is a fault seen?
driver          turns a fault on, asks each check, tabulates
ground_truth    proves whether it changes anything
"""
