"""The proof that a merged checkpoint computes what was trained.

`reference` holds what the trained model said; one script an engine loads the checkpoint in a fresh
process, without this package, and compares; `verify` runs them and judges.
"""
