"""The measuring arm: rooms that write runs."""
