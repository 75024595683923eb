"""Text in the terminal: names, paths and questions are shown as they are written."""

from rich.console import Console


def plain_console(stderr: bool = False) -> Console:
    """Returns a console that reads no text as markup: a cell may be called `[query, value]`."""
    return Console(stderr=stderr, markup=False, emoji=False)
