"""Trains the gates of a recipe and writes a run folder."""
