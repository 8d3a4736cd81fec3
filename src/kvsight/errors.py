"""One exception for everything a user can get wrong."""


class KVSightError(ValueError):
    """Bad input. The message is one line: what was wrong, what was wanted, what to do."""
