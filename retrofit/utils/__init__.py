"""Helpers for every room: errors of one line, files that appear whole, console and process."""
