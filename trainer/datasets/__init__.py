"""Training data: formats on disk, how they are made, and the order in which training reads them.

clips.py and ode_pairs.py read and write the two kinds of data, and lmdb.py their LMDB layout. encode.py,
generate_pairs.py and pack.py make data sets. order.py decides which items a batch holds, captions.py embeds their text.
"""
