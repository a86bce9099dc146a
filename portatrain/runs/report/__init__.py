"""`portatrain report` and `compare`: a run, or several, as one HTML page that needs nothing else, drawn from the record
alone. No framework, no NumPy.

history  (portatrain.runs.history) what the record says: attempts, resume points, checkpoints, time lost
charts   curves as inline SVG
page     the page of a run
curves   several curves on one chart
compared the page of several runs (portatrain.runs.comparison)
"""
