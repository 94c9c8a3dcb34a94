"""Every option of a run, how a recipe is read, and the rules between options. Imports nothing heavy."""
