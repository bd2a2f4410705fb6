"""Recipes as package data: `retrofit recipes ls` lists them, `retrofit train NAME` finds them."""
