"""KV caches: pages, pools of a program, conversion between layouts."""
