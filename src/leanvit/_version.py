"""The version of leanvit; a file of its own so that packaging reads it without importing torch."""

__version__ = "0.2.0"
