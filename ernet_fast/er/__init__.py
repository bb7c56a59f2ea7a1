"""Operators of the ER shortcut sum, its function and its modules."""
