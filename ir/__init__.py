"""Capture, ops and their factor rules, specs, mesh, folding, text form."""
