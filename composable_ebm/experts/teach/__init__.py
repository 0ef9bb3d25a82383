"""A new expert from a handful of marked pictures, in seconds."""

from composable_ebm.experts.teach.lesson import LEAST, Lesson, teach

__all__ = ["LEAST", "Lesson", "teach"]
