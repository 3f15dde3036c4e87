"""Where tables of many columns are printed: whole lines in a file or a pipe."""

import rich.console

WIDEST = 10_000  # columns, no table is as wide


def wide() -> rich.console.Console:
    """Of stdout. Rich takes 80 columns for what is no terminal and would crop a table there."""
    console = rich.console.Console()
    if not console.is_terminal and not console.is_jupyter:
        console.size = rich.console.ConsoleDimensions(WIDEST, console.size.height)
    return console
