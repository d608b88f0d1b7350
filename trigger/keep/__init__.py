"""What may go: which snapshots are thinned or given up, and the room that a storage has.

Pure in `retention`; done in `expire` and `room`. Only `service` and `cli` import from here.
"""
