"""The tasks by name."""

import difflib

from kvsight.errors import KVSightError
from kvsight.eval.tasks import books, continuation, copying, induction, recall
from kvsight.eval.tasks.base import Setting, Task
from kvsight.eval.tasks.last_word import LAMBADA, LAST_WORD

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        LAMBADA,
        LAST_WORD,
        books.TASK,
        copying.TASK,
        induction.TASK,
        recall.TASK,
        continuation.TASK,
    )
}


def chosen(names: str) -> tuple[Task, ...]:
    """The tasks of a comma-separated list, or all of them; an unknown name raises ``KVSightError``."""
    if names == "all":
        return tuple(TASKS.values())
    out = []
    for name in map(str.strip, names.split(",")):
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise KVSightError(f"unknown task {name!r}.{hint} Available: {', '.join(TASKS)}.")
        out.append(TASKS[name])
    return tuple(dict.fromkeys(out))


def possible(tasks: tuple[Task, ...], setting: Setting) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Tasks that have what they need, and those that lack it."""
    lacking = tuple(t for t in tasks if t.needs and getattr(setting, t.needs) is None)
    return tuple(t for t in tasks if t not in lacking), lacking
