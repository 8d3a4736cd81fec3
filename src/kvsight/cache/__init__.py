"""The packed cache, free of any engine: immutable states and pure functions on them."""
