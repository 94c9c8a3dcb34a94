"""All options of a run, the reader of recipes, and the rules between options. Imports no heavy package."""
