"""Compute the cost of a step on a cluster: memory, time and traffic of one device, by arithmetic."""
