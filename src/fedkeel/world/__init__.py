"""A job made real, for simulation and deployment alike: data and who holds it, model, devices, hostile clients."""
