"""The configuration: every option, described once, and the reference made of it.

Imported by every room above. It knows the words only.
"""
