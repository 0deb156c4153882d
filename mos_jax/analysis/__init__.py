"""Looking into trained adapters."""
