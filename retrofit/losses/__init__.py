"""The losses that train the gates: distillation at the output, and losses inside the layers."""
