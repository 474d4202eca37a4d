"""The version of this project. What is stored names it."""

__version__ = "0.1.0"
