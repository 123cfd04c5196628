"""Weights and vocabularies in and out, one file a format."""
