"""What jobs need whose number of ranks changes, at torch.distributed.elastic's names and paths.

Here are the data; starting and restarting ranks is dtrun's.
"""
