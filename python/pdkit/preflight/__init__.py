"""Before a launch: what the tests start, where it goes, whether this machine and the test files are fit for it."""
