"""Request accounting: what clients sent and got, against what the servers say they did meanwhile."""
