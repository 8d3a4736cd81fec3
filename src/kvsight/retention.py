"""Which of the tokens seen so far a cache holds, and how: the closed form of ``cache.side``."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stored:
    """Tokens held by one side of one layer: exact first ones, coded ones, exact last ones.

    ``visible`` of them take part in attention; a sliding layer may hold up to a block more.
    """

    sinks: int
    coded: int
    tail: int
    visible: int

    @property
    def dense(self) -> int:
        return self.sinks + self.tail


@dataclass(frozen=True)
class Hold:
    """What a method keeps exact by itself.

    ``window`` last tokens, and others until there are ``commit`` of them to code: a multiple of the block
    of the method's format, or 1.
    """

    window: int = 0
    commit: int = 1


NOTHING = Hold()


@dataclass(frozen=True)
class Retention:
    """``sinks`` first and at least ``window`` last tokens stay exact; ``sliding`` is the model's window.

    Tokens between are coded in whole blocks. Sliding layers keep no sinks, and drop a block when all of
    it has left the model's window.
    """

    sinks: int
    window: int
    sliding: int | None = None

    def holding(self, hold: Hold) -> "Retention":
        """With at least the window that a method asks for."""
        return replace(self, window=max(self.window, hold.window))

    @property
    def exact_first(self) -> int:
        return self.sinks if self.sliding is None else 0

    @property
    def exact_last(self) -> int:
        return self.window if self.sliding is None else min(self.window, self.sliding - 1)

    def visible(self, seen: int) -> int:
        """Tokens that the next query can attend to, itself not counted."""
        return seen if self.sliding is None else min(seen, self.sliding - 1)

    def stored(self, seen: int, block: int) -> Stored:
        """What is held after ``seen`` tokens when ``block`` tokens are committed together."""
        sinks = min(self.exact_first, seen)
        committed = max(0, seen - sinks - self.exact_last) // block * block
        visible = self.visible(seen)
        dropped = 0 if self.sliding is None else min((seen - visible) // block * block, committed)
        return Stored(sinks, committed - dropped, seen - sinks - committed, visible)
