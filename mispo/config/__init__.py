"""Configuration without torch: `schema` holds every default, `load` composes recipes, `check` refuses nonsense."""
