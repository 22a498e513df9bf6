"""Export to edge runtimes: the graph, its quantisation, and what it costs and gains, measured beside eager PyTorch."""
