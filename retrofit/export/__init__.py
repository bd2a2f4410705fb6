"""Merged checkpoints: the tensor mapping, the files, and the proof that they equal the model."""
