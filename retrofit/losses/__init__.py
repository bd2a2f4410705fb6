"""What the gates are trained on: distillation at the output, and losses inside the layers."""
