"""Which cached page goes first: one small interface, and policies behind it."""
