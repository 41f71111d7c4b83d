"""The command line, `nyscaled`: one file per subcommand, each made from its `Config`."""

from nyscaled.cli.entry import main

__all__ = ["main"]
