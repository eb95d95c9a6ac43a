"""What each kind of dictionary is trained on, and how it is brought into the form that is saved. Each is named in
`training/registry.py`."""
