"""Configuration without torch: `schema` has the sections, `parts` what they choose from, `load` composes recipes."""
