"""The detection matrix: which checks of the suite notice which faults, and that none fails without one.

verdicts  what one test says about each check that it holds
worker    runs the tests of one class against servers that stay up, fault after fault
session   workers side by side, one run after the other
results   what came out, on disk; what is still to do; whether the goal is met
truth     whether a fault changes anything at all
report    the table
"""
