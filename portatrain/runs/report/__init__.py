"""`portatrain report`: a run as one HTML page that needs nothing else, drawn from its record alone. No framework, no
NumPy.

history  (portatrain.runs.history) what the record says: attempts, resume points, checkpoints, time lost
charts   curves as inline SVG
page     the page
"""
