"""Statistics of scores: intervals over seeds and items, comparisons, simulated coverage."""
