"""Training data: formats on disk, their generation, and the order in which training reads them.

clips.py and ode_pairs.py read and write the two kinds of data, and lmdb.py their LMDB layout. encode.py,
generate_pairs.py and pack.py make data sets. order.py selects the items of a batch, captions.py embeds their text.
"""
