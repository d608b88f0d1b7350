"""The configuration: every option, described once, the sections that drivers bring, and the reference made of both.

Imported by every room above; `sections` by the drivers too. Only `drivers` loads connectors, by name.
"""
