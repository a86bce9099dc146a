"""Commands that write pages of this site from the code, so that no fact is written twice."""
