"""The test suite: mirrors `dtrain/` and `launcher/`; helpers shared by tests live beside them.

Four rungs, and a bug is tested on the lowest that can show it: pure functions; ranks as threads
over `local`; ranks as threads over real transports; real processes under `dtrun`.
"""
