"""Names under which the files of users are loaded."""

PREFIX = "_shardwright_"
"""How the names of modules begin that are loaded by the path of their file."""

__all__ = ["PREFIX"]
