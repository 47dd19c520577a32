"""The command `wherefrom`; importing it imports nothing that takes long."""

from wherefrom.cli.entry import main

__all__ = ["main"]
