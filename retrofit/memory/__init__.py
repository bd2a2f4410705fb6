"""What a training step needs in memory, traced without a weight."""
