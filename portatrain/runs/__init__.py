"""A run's record: its folder or URL, the claim on it, attempts, events, jobs, history."""
