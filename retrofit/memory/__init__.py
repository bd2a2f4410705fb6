"""Estimates the memory that a training step needs, by tracing it without weights."""
