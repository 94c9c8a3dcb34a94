"""How a run is distributed over processes."""
