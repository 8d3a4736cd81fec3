"""One page about the records of a directory: pure functions of what was measured."""
