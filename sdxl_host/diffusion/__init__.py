"""The mathematics of the objective: numpy float64, no MindSpore, nothing of the host."""
