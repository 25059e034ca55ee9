"""A solver for problems of nodes, edges and live memory; knows numpy and solvers, no model."""
