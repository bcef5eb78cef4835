"""The modules of dtrain.nn, in files with torch's names.

`dtrain.nn` shows all of them; pickles and scripts name the files here.
"""
