"""The miniature: a small pair that the package trains on its own generated corpus and ships with its weights."""
