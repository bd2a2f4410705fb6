"""Loads training data: reads files, checks rows, renders chats, mixes sources and packs rows."""
