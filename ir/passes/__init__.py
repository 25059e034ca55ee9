"""Passes over graphs: repeated layers folded, fused weights in parts, forms for serving."""
