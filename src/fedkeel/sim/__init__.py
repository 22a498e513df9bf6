"""The simulation: sources, partitions, models, hostile clients, and the simulator that drives the coordinator."""
