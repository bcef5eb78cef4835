"""How bytes get from rank to rank.

`base.Transport` is the protocol, `base.create` makes one by name.
"""
