"""Opens and checks models from disk or the hub: bases, run folders, adapters, published models."""
