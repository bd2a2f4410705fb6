"""The proof that a merged checkpoint computes what was trained.

`reference` records the predictions of the trained model. For each engine a script loads the
checkpoint in a fresh process, without this package, and compares its predictions with the record.
`verify` runs the script and judges its figures.
"""
