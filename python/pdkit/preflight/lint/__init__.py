"""Rules that registered tests keep, checked in their source: SGLang's own, and those that PD tests broke before."""
