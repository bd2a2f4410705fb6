"""Formats of merged checkpoints: one module for each maps the tensors and writes the files."""
