"""A group of commands whose help says in full what each of them does."""

from __future__ import annotations

import click

_WHOLE_SENTENCE = 1000


class Listing(click.Group):
    """A group that wraps the first sentence of each command's help instead of cutting it."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write name and first sentence of every command."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [
            (name, command.get_short_help_str(_WHOLE_SENTENCE))
            for name, command in commands
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
