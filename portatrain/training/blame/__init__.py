"""Which samples of a step are to blame: replay it, measure its samples one by one, and hold them to a band."""
