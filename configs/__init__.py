"""Recipes: one YAML file a run, and the typed schema that loads them."""
