"""The record of a run, in a folder or below a URL: claim, attempts, events, jobs and history."""
