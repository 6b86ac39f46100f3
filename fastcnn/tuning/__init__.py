"""Tuning tables: which backend and algorithm was measured fastest for a call, on this device, with these versions.

A table is a JSON file of one device, one entry a line: the call (op, shapes, dtype, layout, inference or training,
versions) and its winner. Tables ship in this folder; ``fastcnn tune`` writes the user's own into the cache folder
($FASTCNN_CACHE, or fastcnn/ in $XDG_CACHE_HOME or ~/.cache), and trials add to it; the user's entries come first. The
stock layers are a candidate of every measurement, so the winner was never slower than they were.

Only entries of the running versions count: with another torch, cuDNN or Triton the stock layers or the kernels may have
another speed. Patch releases count as the same version.
"""

from fastcnn.tuning.lookup import Found, forget, winner
from fastcnn.tuning.table import Winner

__all__ = ["Found", "Winner", "forget", "winner"]
