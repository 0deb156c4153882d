"""Sweeps: many runs from one definition, with rates chosen on validation data."""
