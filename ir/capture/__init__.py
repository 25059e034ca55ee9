"""From a module to a graph: export, canonical form, Hugging Face models."""
