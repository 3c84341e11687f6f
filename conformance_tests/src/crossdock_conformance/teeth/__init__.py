"""Brokers that are broken on purpose, each with the scenario that convicts it: so that a pass means something.

Every one is the memory broker behind a layer that breaks one promise, in a way that real brokers and their clients do: `honest` has
the layer, `broken` what goes wrong in it, `connection` what goes wrong with a server that comes and goes, `trials` the list of all and
the scenario meant for each. `crossdock conformance --teeth` shows the convictions.
"""
