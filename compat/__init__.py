"""All that is used of torch and transformers beyond what they promise to keep.

`torch.py` and `transformers.py` have a short function, or a name, for each; the rest of the project
uses these and no private name (a test holds that).  `versions.py` says on which versions they were
tried.  When a new version comes out, `pytest tests/compat` lists what is missing in it.
"""
