"""What a run is merged into: mappings of tensors and the files, a module for each format."""
