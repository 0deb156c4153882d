"""Frozen bases: decoder, readers of model files, tokenizers, generation."""
