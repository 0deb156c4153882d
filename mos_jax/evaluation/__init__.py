"""Evaluation: loss and right answers."""
