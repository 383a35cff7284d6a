"""One file a model family: which of its modules map onto which operator sequence.

A patch file names the family's layer class and lists, for each submodule that fused kernels may
take over, the operators it computes in order (norm, projection, rotary, attention, bias, residual,
activation, ...) and where their parameters live; so does `embeddings` for the classes in
`EMBEDDINGS`, where there are any. It holds data and small adapters, never kernels.
A family that computes attention by code of its own lists functions that take the place of methods
of its classes, as `METHODS`; see stof_hf/hf/own.py. Adding a model is adding one file here and one
row to a test.
"""

#: Model types that compute attention by code of their own, and the module that replaces it.
OWN_ATTENTION = {
    "longformer": "longformer",
    "led": "longformer",
    "big_bird": "big_bird",
    "bigbird_pegasus": "big_bird",
    "longt5": "longt5",
    "bloom": "bloom",
    "falcon": "falcon",
    "mpt": "mpt",
}
