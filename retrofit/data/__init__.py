"""Text on its way to the trainer: files, rows, chats, mixing and packing."""
