"""What a step takes there: memory, time and traffic of one device, from arithmetic."""
