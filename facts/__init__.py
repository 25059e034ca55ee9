"""What planner and runtime must agree on: states and specs, the mesh's shape.  No torch here."""
