"""Layout, types, registry, keys, errors: imports nothing of ours but the kernels."""
