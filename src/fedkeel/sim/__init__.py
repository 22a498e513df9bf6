"""The simulation: a virtual clock, work in flight, and the simulator that drives the coordinator."""
