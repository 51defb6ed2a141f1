"""Recipes, the runs that reproduce them, and what these runs show."""
