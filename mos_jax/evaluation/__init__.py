"""Evaluation: loss, right answers and their intervals."""
