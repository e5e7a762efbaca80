"""Can this machine run a suite? Asked in seconds, before anything is started."""
